"""Is the problem that the optimizer solves that of its closures, grad_v g(u, v) = 0?

A penalty of one's own may have another residual, or another product. What it certifies is then
not what the exact values of a check are made of.
"""

from __future__ import annotations

import math

from ..evaluation import Evaluation
from ..linear_solve import conjugate_gradient
from ..tensors import Pair, Tensors, add, axpy, coarsest_eps, norm
from .exact import Implicit

_MOST_PRODUCTS = 1_000
_NEAR = 1e-3  # of ||v||: solutions that are no further apart are one
_APART = 0.01  # of their lengths: residuals that differ by less may be one, where H does not tell


def newton_length(exact: Implicit, at: Pair, residual: Tensors) -> float:
    """||H^{-1} residual|| / ||v||, to two digits; NaN where H is not positive definite."""
    if not exact.positive_definite:
        return math.nan
    newton = conjugate_gradient(
        exact.linear.product, residual, tolerance=1e-2, max_iterations=_MOST_PRODUCTS
    )
    return float(norm(newton.value)) / (float(norm([v.detach() for v in at.lower])) or 1.0)


def at_rounding(exact: Implicit, at: Pair) -> bool:
    """Is grad_v g as small as the rounding of its terms, whose size is about ||H v||?"""
    return float(norm(exact.linear.residual)) <= _rounding(exact, at)


def solves_another(evaluation: Evaluation, exact: Implicit, at: Pair) -> bool:
    """Does the residual that was evaluated vanish elsewhere than grad_v g?"""
    own, residual = evaluation.residual, exact.linear.residual
    apart = axpy(-1.0, residual, own)
    gap, size = float(norm(apart)), float(norm(own)) + float(norm(residual))
    if gap <= coarsest_eps(at.lower) ** 0.5 * size or gap <= _rounding(exact, at):
        return False
    if exact.positive_definite:
        return newton_length(exact, at, apart) > _NEAR
    return gap > _APART * size


def own_certificate(evaluation: Evaluation, exact: Implicit) -> float:
    """||grad_v f + H q|| of the closures' f and g, at the q that was evaluated."""
    return float(norm(add(exact.upper.slope, exact.linear.product(evaluation.adjoint))))


def _rounding(exact: Implicit, at: Pair) -> float:
    terms = exact.linear.product(tuple(v.detach() for v in at.lower))
    return 10.0 * coarsest_eps(at.lower) * float(norm(terms))
