"""What ``LeastSquares`` remembers, with and without the correction. Letters as there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from ..tensors import Tensors
from .forecast import NOTHING_FORECAST, Forecast
from .lower_correction import NO_TRUST, LowerTrust
from .state import DIRECTION, LATE, ZEROS, DualState, along
from .subspace import Past
from .watch import Watch

Corrected = TypeVar("Corrected", bound="SubspaceState")


@dataclass(frozen=True, eq=False)
class LeastSquaresState(DualState):
    """What ``LeastSquares`` remembers."""

    probe: Tensors = along(DIRECTION)
    """The direction of the power iteration."""
    pull: float = 0.0
    """w."""
    curvature: float = 0.0
    """L."""
    probed: float = 0.0
    """||H p|| of the last probe p; 0: none has seen curvature."""
    residual_square: float = 0.0
    """Mean square of ||r||."""
    length: float = 0.0
    """D."""
    signed_curvature: float = 0.0
    """Mean of <nu, H nu>."""
    multiplier_square: float = 0.0
    """Mean square of ||nu||."""
    indefinite: float = 0.0
    """kappa."""
    watch: Watch = Watch()

    def is_backed(self) -> bool:
        """Did the last probe see curvature, and about as much as L says there is?"""
        return 0 < self.probed >= 0.1 * self.curvature


@dataclass(frozen=True, eq=False)
class SubspaceState(LeastSquaresState):
    """With what the correction in the subspace of past multipliers remembers."""

    past: Tensors = along(LATE)
    """q one lower step ago."""
    past_product: Tensors = along(LATE)
    """H q then."""
    past_move: Tensors = along(LATE)
    """By how much q had moved until then."""
    past_move_product: Tensors = along(LATE)
    """H times that."""
    forecast: Forecast = NOTHING_FORECAST

    def before(self) -> Past:
        """Where the multiplier was one lower step ago."""
        return Past(self.past, self.past_product, self.past_move, self.past_move_product)

    def resting(self: Corrected) -> Corrected:
        """After a lower step without correction: what is remembered would be of other Hessians."""
        vectors = "past", "past_product", "past_move", "past_move_product"
        state = self.forgetting(*vectors) if self.forecast.was_made else self  # else it has been
        return state.but(forecast=self.forecast.resting())


@dataclass(frozen=True, eq=False)
class FollowedState(SubspaceState):
    """With what the correction of v remembers."""

    lower_move: Tensors = along(ZEROS)
    """How v moved after the last evaluation."""
    trust: LowerTrust = NO_TRUST
