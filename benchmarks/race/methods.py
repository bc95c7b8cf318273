"""The methods of ``race.py``: every one is a function that makes one upper step, v along the way.

Letters as there: u the upper and v the lower variables, f and g the losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import higher
import torch
from torch import Tensor

from benchmarks.race.problem import Grid, Method, Rates, Step, Task, Values
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchopt

NEUMANN_STEP = 0.1  # where the problem knows none


def penalty(task: Task, rates: Rates, **options: Any) -> Step:
    """This optimizer, every lower step on a batch of its own."""
    optimizer = PenaltyBilevelOptimizer(
        task.upper,
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        upper_constraint=task.upper_constraint,
        allow_unused=task.is_new,  # while the upper level is held
        **options,
    )
    ready = not task.is_new

    def step() -> None:
        nonlocal ready
        task.begin()
        if task.is_new:
            optimizer.restart_lower()
        if ready:  # the very first evaluation looks at what the losses depend on
            with task.held_upper():
                for _ in range(rates.lower_steps - 1):
                    task.draw()
                    optimizer.lower_step(task.upper_loss, task.lower_loss)
        task.draw()
        optimizer.step(task.upper_loss, task.lower_loss)
        ready = True

    return step


def hypergradient(task: Task, rates: Rates, **options: Any) -> Step:
    """This package's reference implementations; the closures draw, see its documentation."""
    if options["method"] == "reverse":
        rates = rates._replace(lower=rates.lower * task.gradient_unit)
    elif options["method"] == "one_step":
        options["step_size"] = task.adjoint_step
    optimizer = HypergradientOptimizer(
        task.upper,
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        lower_steps=rates.lower_steps,
        warm_start="lower" if task.is_new else True,  # an adjoint of other tasks is no start
        upper_constraint=task.upper_constraint,
        **options,
    )

    def lower_loss() -> Tensor:
        task.draw()
        return task.lower_loss()

    def step() -> None:
        task.begin()
        optimizer.step(task.upper_loss, lower_loss)

    return step


def implicit(task: Task, rates: Rates, solve: Callable[[Task], Callable[..., Any]]) -> Step:
    """Implicit differentiation of Adam steps by torchopt's functional interface."""
    upper_rule = torch.optim.Adam(task.upper, lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)
    batch: Any = None

    def loss(values: Values, upper: Values) -> Tensor:
        return task.lower_loss(values, upper, batch)

    @torchopt.diff.implicit.custom_root(torch.func.grad(loss), argnums=1, solve=solve(task))
    def solution(start: Values, upper: Values) -> Values:
        held = tuple(p.detach() for p in upper)
        with task.held_upper():
            for _ in range(rates.lower_steps):
                task.draw()
                lower_rule.zero_grad()
                with torch.enable_grad():
                    task.lower_loss(u=held).backward()
                lower_rule.step()
        return tuple(p.detach().clone().requires_grad_() for p in task.lower)

    def step() -> None:
        nonlocal batch
        task.begin()
        batch = task.draw()
        values = solution(tuple(task.lower), tuple(task.upper))
        upper_rule.zero_grad()
        task.upper_loss(values).backward()
        upper_rule.step()
        keep_in(task)

    return step


@torch.no_grad()
def keep_in(task: Task) -> None:
    """Put u back into its set."""
    if task.upper_constraint is not None:
        for p in task.upper:
            p.clamp_(task.upper_constraint.low, task.upper_constraint.high)


def unrolled(task: Task, rates: Rates) -> Step:
    """higher: differentiate through the lower Adam steps, which go on where they ended."""
    upper_rule = torch.optim.Adam(task.upper, lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)

    def step() -> None:
        task.begin()
        with (
            task.held_upper(graph=True),
            higher.innerloop_ctx(task.module, lower_rule) as (copy, inner),
        ):
            for _ in range(rates.lower_steps):
                task.draw()
                inner.step(task.lower_loss(tuple(copy.parameters())))
            last = tuple(copy.parameters())
            gradients = torch.autograd.grad(task.upper_loss(last), task.upper)
            for p, gradient in zip(task.upper, gradients, strict=True):
                p.grad = gradient
            upper_rule.step()
            keep_in(task)
            with torch.no_grad():  # higher leaves the copying back to its users
                for index, (kept, moved) in enumerate(zip(task.lower, last, strict=True)):
                    kept.copy_(moved)
                    lower_rule.state[kept] = {
                        name: value.detach() if isinstance(value, Tensor) else value
                        for name, value in inner.state[0][index].items()
                    }

    return step


def _conjugate_gradients(task: Task, iterations: int, ridge: float | None) -> Any:
    return torchopt.linear_solve.solve_cg(maxiter=iterations, ridge=ridge)


def _neumann(task: Task) -> Any:
    alpha = task.adjoint_step or NEUMANN_STEP
    return torchopt.linear_solve.solve_inv(ns=True, maxiter=10, alpha=alpha)


def methods_of(
    grid: Grid, ridge: float | None = None, damping: float | None = None, curvature: str = "auto"
) -> dict[str, Method]:
    """By their names in the tables.

    Args:
        grid: of the problem.
        ridge: added to H by torchopt's conjugate gradients.
        damping: by ours.
        curvature: of our optimizers.
    """

    def method(start: Callable[..., Step], group: str, **options: Any) -> Method:
        return Method(partial(start, **options), group, grid.lower_steps, grid.lower)

    def ours(start: Callable[..., Step], group: str, **options: Any) -> Method:
        return method(start, group, **({"curvature": curvature} | options))

    def by_cg(iterations: int) -> Method:
        solve = partial(_conjugate_gradients, iterations=iterations, ridge=ridge)
        return method(implicit, "peer", solve=solve)

    reference = "ours (reference)"
    cg = {"method": "cg", "inner_iterations": 10, "damping": damping}
    return {
        "penalty (default)": ours(penalty, "ours"),
        "penalty, value gap": ours(penalty, "ours", penalty="value", curvature="finite_difference"),
        "Hypergradient, CG 10": ours(hypergradient, reference, **cg),
        "Hypergradient, reverse": ours(hypergradient, reference, method="reverse")._replace(
            lower=grid.gradient
        ),
        "Hypergradient, one step": ours(hypergradient, reference, method="one_step"),
        "torchopt CG 5": by_cg(5),
        "torchopt CG 20": by_cg(20),
        "torchopt Neumann 10": method(implicit, "peer", solve=_neumann),
    } | {
        f"higher unrolled {steps}": method(unrolled, "peer")._replace(lower_steps=(steps,))
        for steps in sorted(grid.lower_steps)
    }
