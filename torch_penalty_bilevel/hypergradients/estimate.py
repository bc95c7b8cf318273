"""One call for every method: a hypergradient, its adjoint, and how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..curvature import takes_differences
from ..linear_solve import Solution
from ..tensors import (
    OptionalTensors,
    Tensors,
    add,
    coarsest_eps,
    norm,
    scale,
    sum_of_optional,
)
from .implicit import sampled_indirect, solve_adjoint
from .options import IMPLICIT, Options
from .problem import Linear, Problem, Upper
from .unrolled import Visit, pull_back


class Estimate(NamedTuple):
    """A hypergradient and what it was made from."""

    upper: Upper
    linear: Linear
    hypergradient: OptionalTensors
    """None where nothing depends on the parameter; NaN after a breakdown."""
    solution: Solution
    """q, with the residual of its equation: ||A q + grad_v f||_2."""


def estimated(
    problem: Problem, method: str, options: Options, visits: Sequence[Visit] = ()
) -> Estimate:
    """The hypergradient at ``problem.at`` by any method but ``"forward"``.

    Args:
        problem: the losses at (u, v); of ``"reverse"`` v is v_T.
        method: its name.
        options: checked; ``step_size`` is needed by ``"one_step"``.
        visits: of ``"reverse"``: the lower steps to go back through.

    Raises:
        NonFiniteError: the losses or their gradients are not finite.
        NondeterministicClosureError: reverse mode met other data when it repeated a step.
    """
    upper, linear = problem.upper(), problem.linearise()
    tolerance = reachable(problem) if options.tolerance is None else options.tolerance
    slope = upper.slope
    indirect: OptionalTensors | None = None
    if method in IMPLICIT:
        solution = solve_adjoint(problem, linear, slope, method, options, tolerance)
        if method == "stochastic" and not _is_broken(solution):
            indirect = sampled_indirect(problem, solution.value, options.samples or 1)
    elif method == "reverse":
        indirect, adjoint = pull_back(problem, visits, slope)
        remedy = "raise lower_steps or truncation"
        solution = certified(linear, slope, adjoint, len(visits), tolerance, remedy)
    elif method == "one_step":
        assert options.step_size is not None
        adjoint = scale(slope, -options.step_size)
        remedy = "one step is exact only where A is a multiple of the identity"
        solution = certified(linear, slope, adjoint, 0, tolerance, remedy)
    elif method == "alternating":
        adjoint = scale(slope, 0.0)
        indirect = (None,) * len(upper.direct)
        remedy = "the direct gradient ignores how v responds to u"
        size = float(norm(slope))
        solution = _judged(adjoint, 0, size, tolerance * size, remedy)
    else:
        raise AssertionError(method)
    if _is_broken(solution):  # no product with NaN: the closures may object
        nan = tuple(torch.full_like(u, torch.nan, requires_grad=False) for u in problem.at.upper)
        return Estimate(upper, linear, nan, solution)
    if indirect is None:
        indirect = linear.both(solution.value)[0]
    return Estimate(upper, linear, sum_of_optional(upper.direct, indirect), solution)


def certified(
    linear: Linear, slope: Tensors, adjoint: Tensors, products: int, tolerance: float, remedy: str
) -> Solution:
    """``adjoint`` with the residual of its equation, which takes one product."""
    error = float(norm(add(slope, linear.product(adjoint))))
    return _judged(adjoint, products, error, tolerance * float(norm(slope)), remedy)


def reachable(problem: Problem) -> float:
    """A relative residual that products in the lower level's dtype can reach."""
    eps = coarsest_eps(problem.at.lower)
    return 30 * eps**0.5 if takes_differences(problem.engine) else max(1e-10, 100 * eps)


def _judged(adjoint: Tensors, products: int, error: float, bound: float, remedy: str) -> Solution:
    converged = error <= bound
    message = f"||A q + grad_v f|| = {error:.1e} > {bound:.1e}; {remedy}"
    return Solution(adjoint, products, error, converged, "converged" if converged else message)


def _is_broken(solution: Solution) -> bool:
    return solution.residual_norm != solution.residual_norm  # NaN
