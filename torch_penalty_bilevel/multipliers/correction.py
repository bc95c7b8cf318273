"""One lower step's correction of the multiplier, by what its state knows."""

from __future__ import annotations

from typing import Any

from ..arguments import checked_truth
from ..evaluation import Norms, Subspace
from ..tensors import Tensors
from . import lower_correction
from . import subspace as spans
from .averages import ratio
from .forecast import expecting, judged
from .least_squares_state import FollowedState, SubspaceState


def check_asked(correct_lower: Any, subspace: Any, has_units: bool) -> None:
    """Raise ValueError where options of a rule exclude each other, TypeError for no truth value."""
    checked_truth("correct_lower", correct_lower)
    if subspace is not None and not isinstance(subspace, bool):
        raise TypeError(f"subspace must be True, False or None, got {subspace!r}")
    if correct_lower and subspace is False:
        raise ValueError(
            "correct_lower=True uses what the multiplier's correction knows of H, and "
            "subspace=False switches that off; leave subspace away"
        )
    if correct_lower and has_units:
        raise ValueError(
            "correct_lower=True moves v in its own units and a preconditioner moves the multiplier "
            "in others; pass one of them"
        )


def corrected(
    multiplier: Tensors,
    state: SubspaceState,
    subspace: Subspace | None,
    norms: Norms,
    shift: float,
    reach: float,
) -> tuple[Tensors, SubspaceState]:
    """``multiplier``, which is past its plain step, and a state that remembers the span.

    Args:
        multiplier: q - (a + mu q) / (L + mu).
        state: of the rule, with the latest L.
        subspace: None where the correction rests.
        norms: with the inner products of ``subspace``.
        shift: mu.
        reach: rho.
    """
    if subspace is None:
        if isinstance(state, FollowedState):
            state = state.but(trust=lower_correction.resting(state.trust))
        return multiplier, state.resting()
    bound = state.curvature + shift
    products = spans.Products.of(norms.inner_products, shift)
    forecast = state.forecast
    if products.are_finite:
        forecast = judged(forecast, products)
        coefficients = spans.correction(products, bound, forecast.gain, reach)
        step = ratio(1.0, bound)
        multiplier = spans.corrected(multiplier, subspace, coefficients, step, shift)
        forecast = expecting(forecast, products, coefficients, step)
        if isinstance(state, FollowedState):
            trust = lower_correction.judged(state.trust, products)
            state = state.but(trust=lower_correction.remembering(trust, products))
    (past, move, _), (past_product, move_product, _) = subspace.basis, subspace.images
    return multiplier, state.but(
        past=past,
        past_product=past_product,
        past_move=move,
        past_move_product=move_product,
        forecast=forecast,
    )
