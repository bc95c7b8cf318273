"""The solvers, all under one protocol: make a step, tell the watch what it has cost.

Penalty rows are ``PenaltyBilevelOptimizer``, hypergradient rows ``HypergradientOptimizer`` by their
``method``, with 10 products per adjoint at most and warm starts, as by default. The defaults are
kept but for this: double backward everywhere (``"auto"`` may count products twice, as differences),
5 lower steps per upper step, and eta below.

eta = 1 / L is the step of Neumann series, fixed-point iteration, "stochastic" and "one_step", and
the unit of the lower rates of "reverse" and "forward", which take plain gradient steps. L is
the largest curvature of g at the start, by 20 products, which are charged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.profiles.problems import Instance
from torch_penalty_bilevel import (
    HypergradientOptimizer,
    LeastSquares,
    MinimizeResult,
    PenaltyBilevelOptimizer,
    Stationarity,
    minimize,
)
from torch_penalty_bilevel.curvature import VectorJacobian
from torch_penalty_bilevel.hypergradients import LocalProblem, MethodOptions, pure_hypergradient
from torch_penalty_bilevel.linear_solve.spectrum import largest_stretch
from torch_penalty_bilevel.penalties import Losses, Penalty
from torch_penalty_bilevel.tensors import Pair

LOWER_STEPS = 5
POWER_STEPS = 20
RATES = ((0.3, 0.3), (0.3, 0.1), (0.1, 0.3), (0.1, 0.1))
GRADIENT_RATES = ((0.3, 1.0), (0.3, 0.3), (0.1, 1.0), (0.1, 0.3))
"""(upper, lower) of those whose lower steps are plain gradient steps; lower in units of 1 / L."""

Rates = tuple[float, float]


class Watch(Protocol):
    """What a solver tells after every step."""

    def __call__(self, spent: int, u: Tensor, v: Tensor, last: bool) -> bool:
        """Evaluations so far, where it is, and will the budget end here? Returns: is it over?"""
        ...


class Solver(NamedTuple):
    """Runs until the watch says that it is over, and says how it ended."""

    run: Callable[[Instance, Rates, int, Watch], str]
    rates: tuple[Rates, ...] = RATES


def decay(spent: float, budget: float) -> float:
    """Of all rates, by the share of the budget that is spent: to zero, like half a cosine."""
    return (1 + math.cos(math.pi * min(spent / budget, 1.0))) / 2


def is_last(before: int, spent: int, budget: int) -> bool:
    """Would another step like the one from ``before`` to ``spent`` pass the budget?"""
    return spent + (spent - before) > budget


def curvature(instance: Instance) -> float:
    """||H||_2 at the start; 1 where H is zero."""
    v = instance.v.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(instance.g(instance.u, v), v, create_graph=True)

    def product(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient, v, x[0], retain_graph=True, materialize_grads=True)

    return largest_stretch(product, (v,), steps=POWER_STEPS) or 1.0


def _loop(
    optimizer: PenaltyBilevelOptimizer | HypergradientOptimizer,
    u: Tensor,
    v: Tensor,
    f: Callable[[], Tensor],
    g: Callable[[], Tensor],
    rates: Rates,
    budget: int,
    watch: Watch,
    charged: int = 0,
) -> str:
    """Steps with decaying rates."""
    spent = charged
    while True:
        for group in optimizer.param_groups:
            group["lr"] = rates[group["level"] == "lower"] * decay(spent, budget)
        optimizer.step(f, g)
        before, spent = spent, charged + optimizer.metrics.gradient_evaluations
        if watch(spent, u.detach(), v.detach(), is_last(before, spent, budget)):
            return "over"


def penalty(
    instance: Instance,
    rates: Rates,
    budget: int,
    watch: Watch,
    *,
    form: Callable[[], str | Penalty],
    lower_steps: int | Literal["auto"],
) -> str:
    """``PenaltyBilevelOptimizer``."""
    u, v = (t.clone().requires_grad_() for t in (instance.u, instance.v))
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], penalty=form(), lower_steps=lower_steps, curvature="double_backward"
    )
    is_map = optimizer.penalty.lower_is_map
    low = (lambda: (instance.phi(u, v),)) if is_map else (lambda: instance.g(u, v))
    return _loop(optimizer, u, v, lambda: instance.f(u, v), low, rates, budget, watch)


def hypergradient(
    instance: Instance, rates: Rates, budget: int, watch: Watch, *, method: str
) -> str:
    """``HypergradientOptimizer``."""
    u, v = (t.clone().requires_grad_() for t in (instance.u, instance.v))
    charged, options = 0, {}
    if method in ("neumann", "fixed_point", "stochastic", "one_step"):
        charged, options["step_size"] = POWER_STEPS, 1 / curvature(instance)
    if method == "reverse":
        charged, rates = POWER_STEPS, (rates[0], rates[1] / curvature(instance))
    optimizer = HypergradientOptimizer(
        [u], [v], method=method, lower_steps=LOWER_STEPS, curvature="double_backward", **options
    )
    losses = (lambda: instance.f(u, v)), (lambda: instance.g(u, v))
    return _loop(optimizer, u, v, *losses, rates, budget, watch, charged)


def forward(instance: Instance, rates: Rates, budget: int, watch: Watch) -> str:
    """Forward mode on pure functions: gradient steps on v with dv/du carried along, Adam on u."""
    u, v = instance.u.clone(), instance.v
    rule = torch.optim.Adam([u])
    eta, spent = rates[1] / curvature(instance), POWER_STEPS
    f, g = (lambda a, b: instance.f(a[0], b[0])), (lambda a, b: instance.g(a[0], b[0]))
    while True:
        factor = decay(spent, budget)
        rule.param_groups[0]["lr"] = rates[0] * factor
        local = LocalProblem(Losses(f, g), Pair((u,), (v,)), VectorJacobian())
        # A rate of exactly zero, at the end of the budget, is no step size.
        step = MethodOptions(lower_steps=LOWER_STEPS, step_size=eta * max(factor, 1e-12))
        (u.grad,), _ = pure_hypergradient(local, "forward", step)
        (v,) = local.at.lower
        rule.step()
        before, spent = spent, spent + local.evaluations
        if watch(spent, u, v, is_last(before, spent, budget)):
            return "over"


def newton(instance: Instance, rates: Rates, budget: int, watch: Watch) -> str:
    """``minimize`` without restarts; it has no rates."""

    def callback(result: MinimizeResult) -> bool:
        return watch(result.evaluations, result.upper, result.lower, False)

    start = instance.u, instance.v
    end = minimize(instance.f, instance.g, *start, max_evaluations=budget, callback=callback)
    watch(end.evaluations, end.upper, end.lower, True)
    return end.status


def _penalty(
    form: Callable[[], str | Penalty], lower_steps: int | Literal["auto"] = LOWER_STEPS
) -> Solver:
    return Solver(functools.partial(penalty, form=form, lower_steps=lower_steps))


def _hypergradient(method: str) -> Solver:
    rates = GRADIENT_RATES if method == "reverse" else RATES
    return Solver(functools.partial(hypergradient, method=method), rates)


SOLVERS: dict[str, Solver] = {
    "default": _penalty(lambda: "stationarity"),
    "no correction": _penalty(lambda: Stationarity(LeastSquares(subspace=False))),
    "share=0": _penalty(lambda: Stationarity(LeastSquares(share=0.0))),
    "waiting": _penalty(lambda: "stationarity", "auto"),
    "paper": _penalty(lambda: "paper"),
    "value": _penalty(lambda: "value"),
    "fixed_point penalty": _penalty(lambda: "fixed_point"),
    "cg": _hypergradient("cg"),
    "cg_normal": _hypergradient("cg_normal"),
    "neumann": _hypergradient("neumann"),
    "fixed_point": _hypergradient("fixed_point"),
    "stochastic": _hypergradient("stochastic"),
    "approx_grad": _hypergradient("approx_grad"),
    "reverse": _hypergradient("reverse"),
    "forward": Solver(forward, GRADIENT_RATES),
    "one_step": _hypergradient("one_step"),
    "alternating": _hypergradient("alternating"),
    "minimize": Solver(newton, ((0.0, 0.0),)),
    "default, 2 steps": _penalty(lambda: "stationarity", 2),
}
EXTRA = ("default, 2 steps",)
"""Run only when asked for: of no other solver were the lower steps chosen."""
