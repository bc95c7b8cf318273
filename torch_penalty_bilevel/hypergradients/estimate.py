"""One call for every method: a hypergradient, its adjoint, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..constraints import Faces
from ..evaluation import Evaluation
from ..linear_solve import NOT_FINITE, Solution, broken
from ..tensors import (
    OptionalTensors,
    Tensors,
    add,
    norm,
    norms,
    scale,
    sum_of_optional,
)
from .implicit import sampled_indirect, solve_adjoint
from .options import IMPLICIT, MethodOptions
from .problem import LocalProblem, Upper
from .unrolled import Visit, pull_back


class Estimate(NamedTuple):
    """A hypergradient and what it was made from."""

    upper: Upper
    lower_loss: Tensor
    """g, or ||r||^2 / 2 of a map; 0-d."""
    residual: Tensors
    """r."""
    hypergradient: OptionalTensors
    """None where nothing depends on the parameter; NaN after a breakdown."""
    solution: Solution
    """q, with the residual of its equation, damped if it was: ||A q + grad_v f||_2."""
    product: Tensors
    """A q, without damping; empty after a breakdown."""

    def on_face(self, face: Faces, cost: int, used: Tensors = ()) -> Evaluation:
        """What an optimizer's step needs: the hypergradient along the face of u."""
        return Evaluation(
            upper_loss=self.upper.loss,
            lower_loss=self.lower_loss,
            adjoint=self.solution.value,
            residual=self.residual,
            adjoint_residual=add(self.upper.slope, self.product),
            upper_grad=face.optional_tangent(self.hypergradient),
            slope_norms=norms(self.upper.slope),
            product_norms=norms(self.product),
            probe_product=(),
            cost=cost,
            upper_face=face,
            upper_used=used,
        )


def estimated(
    problem: LocalProblem, method: str, options: MethodOptions, visits: Sequence[Visit] = ()
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
    upper = problem.upper()
    tolerance = options.tolerance
    if tolerance is None:
        tolerance = problem.engine.attainable(problem.at.lower)
    slope = upper.slope
    if method == "alternating":
        lower_loss, residual = problem.residual()
        nothing = scale(slope, 0.0)
        remedy = "the direct gradient leaves out how v responds to u"
        solution = _judged(nothing, 0, slope, slope, tolerance, remedy)
        return Estimate(upper, lower_loss, residual, upper.direct, solution, nothing)
    indirect: OptionalTensors | None = None
    unrolled = pull_back(problem, visits, slope) if method == "reverse" else None
    linear = problem.linearise()  # not earlier: live v went elsewhere and back
    if method in IMPLICIT:
        solution = solve_adjoint(problem, linear, slope, method, options, tolerance)
    elif unrolled is not None:
        indirect, adjoint = unrolled
        error = add(slope, linear.product(adjoint))
        remedy = "raise lower_steps or truncation"
        solution = _judged(adjoint, len(visits), error, slope, tolerance, remedy)
    elif method == "one_step":
        assert options.step_size is not None
        adjoint = scale(slope, -options.step_size)
        error = add(slope, linear.product(adjoint))
        remedy = "one step is exact only where A is the identity over step_size"
        solution = _judged(adjoint, 0, error, slope, tolerance, remedy)
    else:
        raise AssertionError(method)
    if solution.broke_down:  # no product with NaN: the closures may object
        nan = tuple(torch.full_like(u, torch.nan, requires_grad=False) for u in problem.at.upper)
        return Estimate(upper, linear.loss, linear.residual, nan, solution, ())
    if method == "stochastic":
        indirect = sampled_indirect(problem, solution.value, options.samples or 1)
    through_upper, product = linear.both(solution.value)
    total = sum_of_optional(upper.direct, through_upper if indirect is None else indirect)
    return Estimate(upper, linear.loss, linear.residual, total, solution, product)


def _judged(
    adjoint: Tensors, products: int, error: Tensors, slope: Tensors, tolerance: float, remedy: str
) -> Solution:
    """``adjoint`` as the solution it is, with residual ``error``."""
    size, bound = float(norm(error)), tolerance * float(norm(slope))
    if size <= bound < math.inf:  # of infinite norms nothing is known
        return Solution(adjoint, products, size, "converged", "converged")
    if math.isnan(size):
        return broken(slope, products, "not_finite", NOT_FINITE)
    message = f"||A q + grad_v f|| = {size:.1e} > {bound:.1e}; {remedy}"
    return Solution(adjoint, products, size, "unfinished", message)
