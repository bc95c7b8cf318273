"""What is compared: this package, the hand-written floor and the peers, each as one outer step.

Every method takes one lower step with Adam 1e-3 (unrolling: T with SGD, which it
differentiates), finds a hypergradient and takes one step of u with Adam 0.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.floor import floor
from benchmarks.speed.problems import Problem
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

UPPER_LR, LOWER_LR = 0.1, 1e-3
ITERATIONS = 10
Step = Callable[[], object]
Method = Callable[[Problem], Step]


def gradient(problem: Problem) -> Step:
    """The unit: one plain gradient of g with respect to v."""
    v = problem.lower
    return lambda: torch.autograd.grad(problem.g(), v)


def training(
    problem: Problem,
    rule: type[torch.optim.Optimizer] = torch.optim.Adam,
    lower_lr: float = LOWER_LR,
) -> Step:
    """A step of the lower level alone."""
    v = problem.lower
    optimizer = rule(v, lr=lower_lr)

    def step() -> None:
        optimizer.zero_grad()
        for parameter, grad in zip(v, torch.autograd.grad(problem.g(), v), strict=True):
            parameter.grad = grad
        optimizer.step()

    return step


def penalty(
    problem: Problem,
    lower_rule: type[torch.optim.Optimizer] = torch.optim.Adam,
    lower_lr: float = LOWER_LR,
    **options: Any,
) -> Step:
    """``PenaltyBilevelOptimizer``."""
    upper_rule = torch.optim.SparseAdam if problem.weights.sparse else torch.optim.Adam
    optimizer = PenaltyBilevelOptimizer(
        upper_rule([problem.upper], lr=UPPER_LR), lower_rule(problem.lower, lr=lower_lr), **options
    )
    return lambda: optimizer.step(problem.f, problem.g)


def implicit(problem: Problem) -> Step:
    """``HypergradientOptimizer`` with conjugate gradients, damped: they refuse H < 0."""
    optimizer = HypergradientOptimizer(
        [problem.upper],
        problem.lower,
        method="cg",
        upper_lr=UPPER_LR,
        lower_lr=LOWER_LR,
        inner_iterations=ITERATIONS,
        tolerance=1e-30,  # all iterations, as for the peers
        damping=10.0,
        warm_start="lower",
    )
    return lambda: optimizer.step(problem.f, problem.g)


def torchopt(problem: Problem, solver: str) -> Step:
    """Implicit differentiation by torchopt's ``custom_root``."""
    library: Any = importlib.import_module("torchopt")
    solve = {
        "cg": lambda: library.linear_solve.solve_cg(maxiter=ITERATIONS, rtol=0.0, atol=0.0),
        "neumann": lambda: library.linear_solve.solve_inv(ns=True, maxiter=ITERATIONS, alpha=0.1),
    }[solver]()
    names = [name for name, _ in problem.model.named_parameters()]
    v, rows = problem.lower, problem.lower_batch[2]
    upper_rule = torch.optim.Adam([problem.upper], lr=UPPER_LR)
    lower_step = training(problem)

    def loss(values: tuple[Tensor, ...], scores: Tensor) -> Tensor:
        return problem.g(dict(zip(names, values, strict=True)), scores)

    @library.diff.implicit.custom_root(torch.func.grad(loss), argnums=1, solve=solve)
    def solution(start: tuple[Tensor, ...], scores: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            lower_step()
        return tuple(p.detach().clone().requires_grad_() for p in v)

    def step() -> None:
        values = solution(tuple(v), problem.weights(rows)[:, 0])
        upper_rule.zero_grad()
        problem.f(dict(zip(names, values, strict=True))).backward()
        upper_rule.step()

    return step


def unrolled(problem: Problem, steps: int) -> Step:
    """``steps`` lower steps with SGD, differentiated by higher."""
    higher: Any = importlib.import_module("higher")
    v = problem.lower
    upper_rule = torch.optim.Adam([problem.upper], lr=UPPER_LR)
    lower_rule = torch.optim.SGD(v, lr=0.1)
    rows = problem.lower_batch[2]

    def step() -> None:
        upper_rule.zero_grad()
        with higher.innerloop_ctx(problem.model, lower_rule) as (model, rule):
            copy = Problem(model, problem.weights, problem.upper_batch, problem.lower_batch)
            for _ in range(steps):
                rule.step(copy.g(scores=problem.weights(rows)[:, 0]))
            copy.f().backward(inputs=[problem.upper])
            with torch.no_grad():
                for parameter, value in zip(v, model.parameters(), strict=True):
                    parameter.copy_(value)
        upper_rule.step()

    return step


OURS = "penalty, default"
FINITE = "penalty, finite differences"
DOUBLE = "penalty, double backward"
FLOOR = "hand-written loop (floor)"
TORCHOPT_CG = f"torchopt, CG {ITERATIONS}"
METHODS: dict[str, Method] = {
    OURS: penalty,
    FINITE: lambda p: penalty(p, curvature="finite_difference"),
    DOUBLE: lambda p: penalty(p, curvature="double_backward"),
    "penalty, value gap": lambda p: penalty(p, penalty="value"),
    FLOOR: floor,
    f"HypergradientOptimizer, CG {ITERATIONS}": implicit,
    TORCHOPT_CG: lambda p: torchopt(p, "cg"),
    f"torchopt, Neumann {ITERATIONS}": lambda p: torchopt(p, "neumann"),
    "higher, unrolled 1": lambda p: unrolled(p, 1),
    "higher, unrolled 5": lambda p: unrolled(p, 5),
    "higher, unrolled 20": lambda p: unrolled(p, 20),
}
# Not measured, and why.
ABSENT = {"Betty": "betty-ml 0.2.1 declares Requires-Python >=3.6,<3.11 and does not install"}
