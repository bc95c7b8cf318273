"""One lower step's correction, of the multiplier and where asked of v, by what its state knows."""

from __future__ import annotations

from typing import Any

from ..arguments import checked_truth
from ..evaluation import Evaluation, Norms, Subspace
from ..tensors import Tensors, cast_like, combination, sum_of
from . import subspace as spans
from .averages import ratio
from .forecast import expecting, judged
from .least_squares_state import SubspaceState
from .protocol import Jump


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
        return multiplier, state.but(forecast=state.forecast.resting())
    bound = state.curvature + shift
    products = spans.Products.of(norms.inner_products, shift)
    forecast = state.forecast
    if products.are_finite:
        forecast = judged(forecast, products)
        coefficients = spans.correction(products, bound, forecast.gain, reach)
        step = ratio(1.0, bound)
        multiplier = spans.corrected(multiplier, subspace, coefficients, step, shift)
        forecast = expecting(forecast, products, coefficients, step)
    (past, move, _), (past_product, move_product, _) = subspace.basis, subspace.images
    return multiplier, state.but(
        past=past,
        past_product=past_product,
        past_move=move,
        past_move_product=move_product,
        forecast=forecast,
    )


def lower_jump(
    state: SubspaceState, evaluation: Evaluation, norms: Norms, shift: float
) -> Jump | None:
    """B c for v, and r + H B c; None without trust or directions.

    The gain is the multiplier's: what spoils the images for one spoils them for the other. To judge
    forecasts of B'r one would have to remember v as well, to know what its own rule did.
    """
    subspace = evaluation.subspace
    if subspace is None:
        return None
    products = spans.Products.of(norms.inner_products, shift)
    if not products.are_finite:
        return None
    bound, gain = state.curvature + shift, state.forecast.gain
    coefficients = spans.lower_correction(products, bound, gain)
    if not any(coefficients):
        return None
    image = cast_like(combination(coefficients, subspace.images), evaluation.residual)
    residual = tuple(map(sum_of, evaluation.residual, image))
    return Jump(combination(coefficients, subspace.basis), residual)
