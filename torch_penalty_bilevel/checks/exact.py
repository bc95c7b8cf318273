"""The implicit hypergradient of two losses at a point, and of the lower level solved from there.

Slow and exact: for checks, not for steps. Letters: r = grad_v g, H = d2g/dv2, J = d2g/du dv.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature import Curvature, Loss
from ..curvature.micro_batches import mean_gradient, value_of
from ..hypergradients import Linear, LocalProblem, MethodOptions, Upper, solve_adjoint
from ..linear_solve import Solution, conjugate_gradient
from ..penalties import Losses, Reduce
from ..tensors import (
    OptionalPair,
    Pair,
    Tensors,
    add,
    axpy,
    cast_like,
    clones,
    dense,
    filled,
    norm,
    scale,
)


class ImplicitProblem(LocalProblem):
    """Losses at leaves that require grad, whose lower level can be solved where it lies.

    Args:
        losses: f and g.
        at: leaves that require grad. ``solve_lower`` moves ``at.lower`` in place.
        engine: second-order products.
        reduce: averages a tuple of tensors over the workers.
    """

    def __init__(self, losses: Losses, at: Pair, engine: Curvature, reduce: Reduce) -> None:
        super().__init__(losses, at, engine, reduce=reduce)
        # Which engine "auto" ends with shows at its first product: before any is counted on.
        if engine.falls_back and not engine.takes_differences:
            linearised = engine.linearise(losses.lower, at)
            linearised.product(cast_like(linearised.residual, at.lower))

    @property
    def engine_name(self) -> str:
        """Of the engine in use."""
        return self.engine.in_use.name

    @property
    def differences(self) -> bool:
        """Are products differences of gradients, with an error of their own?"""
        return self.engine.takes_differences

    @property
    def tolerance(self) -> float:
        """Relative residual of the adjoint equation that products in this dtype can reach."""
        return self.engine.attainable(self.at.lower)

    def solve_lower(self, max_iterations: int = 200) -> float:
        """Move v to a minimiser of g(u, .); returns ||r||_2 there.

        L-BFGS with a strong Wolfe search finds the neighbourhood; its accuracy ends where changes
        of g drown in rounding, so Newton steps by conjugate gradients follow, each kept only if
        ||r|| falls.
        """
        solver = torch.optim.LBFGS(
            self.at.lower,
            max_iter=max_iterations,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        factor = 1.0 / max(float(norm(self._lower_gradient()[1])), torch.finfo(torch.float32).tiny)

        def scaled() -> float:  # L-BFGS drops pairs with <y, s> below a constant with units
            value, gradient = self._lower_gradient()
            for parameter, slope in zip(self.at.lower, scale(gradient, factor), strict=True):
                parameter.grad = slope.to(parameter.dtype)
            return float(value) * factor

        solver.step(scaled)
        error = float(norm(self._lower_gradient()[1]))
        for _ in range(5):
            after = self._newton_step(error)
            if not after < error:
                break
            error = after
        return error

    def solved_value(self, shift: Tensors) -> tuple[float, float]:
        """The pair f(u + shift, v*(u + shift)), ||r||_2 there; v is solved for from where it is.

        Both levels are put back.
        """
        before = Pair(clones(self.at.upper), clones(self.at.lower))
        _assign(self.at.upper, add(cast_like(shift, before.upper), before.upper))
        error = self.solve_lower()
        value = float(self.reduce((value_of(self.losses.upper, self.at),))[0])
        _assign(self.at.upper, before.upper)
        _assign(self.at.lower, before.lower)
        return value, error

    def _newton_step(self, error: float) -> float:
        """One step v -= H^{-1} r, undone unless ||r|| falls below ``error``; returns ||r||."""
        linear = self.linearise()
        newton = conjugate_gradient(
            linear.product, linear.residual, tolerance=1e-3, max_iterations=200
        )
        if newton.broke_down:
            return math.inf
        before = clones(self.at.lower)
        _assign(self.at.lower, cast_like(axpy(-1.0, newton.value, before), before))
        after = float(norm(self._lower_gradient()[1]))
        if not after < error:
            _assign(self.at.lower, before)
        return after

    def _lower_gradient(self) -> tuple[Tensor, Tensors]:
        def one(loss: Loss) -> tuple[Tensor, OptionalPair]:
            value = loss(*self.at)
            slopes = torch.autograd.grad(value, self.at.lower, allow_unused=True)
            return value.detach(), OptionalPair((), slopes)

        value, slopes = mean_gradient(one, self.losses.lower)
        gradient = tuple(dense(r) for r in filled(slopes.lower, self.at.lower))
        averaged = self.reduce((value, *gradient))
        return averaged[0], averaged[1:]


class Implicit(NamedTuple):
    """The implicit hypergradient at one point, and how its linear solve ended."""

    hypergradient: Tensors
    """grad_u f + J q; NaN where the adjoint equation could not be solved."""
    positive_definite: bool
    """Conjugate gradients met positive curvature only."""
    solution: Solution
    """q with (H + lambda I) q = -grad_v f."""
    upper: Upper
    """f and its gradient."""
    linear: Linear
    """r and products with H and J."""

    @property
    def direct(self) -> Tensors:
        """grad_u f, dense."""
        return tuple(dense(d) for d in filled(self.upper.direct, self.hypergradient))

    def products(self, direction: Tensors) -> Pair:
        """(J q, H q), dense."""
        through_upper, product = self.linear.both(direction)
        filled_up = filled(through_upper, self.hypergradient)
        return Pair(tuple(dense(t) for t in filled_up), product)


def implicit_hypergradient(
    problem: LocalProblem, options: MethodOptions, tolerance: float
) -> Implicit:
    r"""The implicit function theorem, solved to tolerance.

    .. math:: \nabla_u f + J q, \qquad (H + \lambda I) q = -\nabla_v f

    By conjugate gradients; if H + lambda I is not positive definite by least squares, which gives
    the same formula at a saddle. Where that does not converge either, NaN.

    Args:
        problem: where.
        options: ``damping`` (lambda) and ``max_iterations``, which least squares may use twice.
        tolerance: bound on ||(H + lambda I) q + grad_v f||_2 / ||grad_v f||_2.
    """
    upper, linear = problem.upper(), problem.linearise()
    equation = problem, linear, upper.slope
    solution = solve_adjoint(*equation, "cg", options, tolerance)
    broke_down = solution.broke_down
    if broke_down:
        twice = options.max_iterations and 2 * options.max_iterations
        patient = replace(options, max_iterations=twice)
        again = solve_adjoint(*equation, "cg_normal", patient, tolerance)
        nan = scale(upper.slope, math.nan)
        solution = again if again.converged else again._replace(value=nan)
    nowhere = tuple(torch.full_like(dense(u.detach()), math.nan) for u in problem.at.upper)
    found = Implicit(nowhere, not broke_down, solution, upper, linear)
    if broke_down and not solution.converged:  # no product with NaN: the closures may object
        return found
    return found._replace(hypergradient=add(found.direct, found.products(solution.value).upper))


@torch.no_grad()
def _assign(parameters: Tensors, values: Tensors) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
