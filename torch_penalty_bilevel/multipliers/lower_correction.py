r"""The correction for v: the same matrix that moves the multiplier, with a trust of its own.

Letters as in ``subspace.py``; r = grad_v g at v, d how v has moved since the evaluation before.

.. math:: v \leftarrow v - t\,\text{gain}\, B (B'HB)^{-1} B'r

It is the step to the minimiser of g's quadratic model in span B. The directions are those in which
the multiplier is slow, the flat ones of H, and v is slow in the same. Differences of v would be
directions of its own, but what they see of H passes through the lower rule's momentum and the
changes of u.

It has a trust of its own. Whatever moved v, its rule or this, r should have changed by H d since,
and (HB)'d is known; so it is known what B'r would be now, had v not moved. With x that and y what
it was, in the span that is still remembered and over ||r_before||^2 + ||r_now||^2,

.. math::
    \text{gain} = \max\Bigl(0, 1 - \frac{\text{mean} \lVert x - y\rVert^2}
    {\text{mean} \lVert y\rVert^2}\Bigr)

over about ten lower steps, as in ``forecast.py``. Noise in r alone (labels or targets that change
from batch to batch), which forecasts of B'a do not see, brings it to 0; with the gain of those v
was thrown out along flat directions. t keeps the step within twice the length of d where the last
forecast came true, ||x - y||^2 <= ||y||^2 / 4, within a quarter where not: a model of H where v is
says nothing of where g is flat, and a few lucky forecasts in noise must not carry far. Tried and
worse under noise: a reach that fades slowly, and x'y / y'y in the place of both tests, which does
not take the moves of u for noise but lets lucky streaks through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..evaluation import Evaluation, Norms
from ..tensors import cast_like, combination, sum_of
from .averages import average, ratio
from .forecast import WORST, in_last_span, of_last_span
from .protocol import Jump
from .small_matrices import inner, times
from .subspace import Products, conjugate, descended, seen

# Of L: r does not see the kernel of H, so this may look further than the multiplier's energy; it is
# needed at condition 1e4.
_LEAST = 1e-4
_MEMORY = 0.9
_DOUBT = 0.3
_TRUE = 0.25
_FURTHER, _NEARER = 2.0, 0.25


@dataclass(frozen=True)
class LowerTrust:
    """What of B'r lasts, and what it was at the evaluation before."""

    lower_missed: float = _DOUBT
    """N."""
    lower_at_stake: float = _DOUBT
    """D."""
    lower_gain: float = 0.0
    """What share of the step is made."""
    lower_surprise: float = 1.0
    """The last ||x - y||^2 / ||y||^2."""
    along_multiplier_of_lower: float = 0.0
    """<q, r> at the evaluation before."""
    along_move_of_lower: float = 0.0
    """<q - q_-1, r> there."""
    residual_square_before: float = 0.0
    """||r||^2 there."""
    lower_was_seen: bool = False
    """Is there an evaluation before?"""


NO_TRUST = LowerTrust()


def judged(trust: LowerTrust, products: Products) -> LowerTrust:
    """With the gain that the latest evaluation leaves it."""
    unit = trust.residual_square_before + products.lower_squares[0]
    if not trust.lower_was_seen or not unit > 0:
        return trust
    # What B'r would be now, had v not moved.
    slopes = products.lower_slopes, products.lower_images
    first, second = of_last_span([r - moved for r, moved in zip(*slopes, strict=True)])
    old = trust.along_multiplier_of_lower, trust.along_move_of_lower
    error = in_last_span(products, first - old[0], second - old[1])
    square = in_last_span(products, *old)
    missed = average(trust.lower_missed, min(error / unit, WORST), _MEMORY)
    at_stake = average(trust.lower_at_stake, square / unit, _MEMORY)
    return replace(
        trust,
        lower_missed=missed,
        lower_at_stake=at_stake,
        lower_gain=max(0.0, 1.0 - missed / at_stake) if at_stake > 0 else 0.0,
        lower_surprise=ratio(error, square) if square > 0 else float(error > 0),
    )


def remembering(trust: LowerTrust, products: Products) -> LowerTrust:
    """For the next evaluation."""
    multiplier, move, _ = products.lower_slopes
    return replace(
        trust,
        along_multiplier_of_lower=multiplier,
        along_move_of_lower=move,
        residual_square_before=products.lower_squares[0],
        lower_was_seen=True,
    )


def resting(trust: LowerTrust) -> LowerTrust:
    """After a lower step without inner products."""
    return replace(trust, lower_was_seen=False)


def coefficients_of(products: Products, bound: float, trust: LowerTrust) -> list[float]:
    """Three, of the directions, that v moves by.

    Args:
        products: with those of r.
        bound: L + mu.
        trust: as judged by the latest evaluation.
    """
    if trust.lower_gain == 0:
        return [0.0, 0.0, 0.0]
    rows, curvature, noise = seen(products)
    directions = conjugate(curvature, max(_LEAST * bound, noise), rows)
    found = descended(directions, products.lower_slopes, trust.lower_gain)
    length = math.sqrt(max(0.0, inner(found, times(products.basis, found))))
    reach = math.sqrt(products.lower_squares[1])
    reach *= _FURTHER if trust.lower_surprise <= _TRUE else _NEARER
    share = min(1.0, ratio(reach, length))
    return [share * number for number in found]


def jump(
    trust: LowerTrust, evaluation: Evaluation, norms: Norms, shift: float, curvature: float
) -> Jump | None:
    """B c for v, and r + H B c; None without trust or directions.

    Args:
        trust: before this evaluation.
        evaluation: with the directions.
        norms: with their inner products.
        shift: mu.
        curvature: L.
    """
    subspace = evaluation.subspace
    if subspace is None:
        return None
    products = Products.of(norms.inner_products, shift)
    if not products.are_finite:
        return None
    coefficients = coefficients_of(products, curvature + shift, judged(trust, products))
    if not any(coefficients):
        return None
    image = cast_like(combination(coefficients, subspace.images), evaluation.residual)
    residual = tuple(map(sum_of, evaluation.residual, image))
    return Jump(combination(coefficients, subspace.basis), residual)
