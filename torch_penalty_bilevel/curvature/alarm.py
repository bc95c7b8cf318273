"""Has the certificate grown since the engine was last looked at?"""

from __future__ import annotations

import math
from typing import NamedTuple


class Alarm(NamedTuple):
    r"""Rings when ||a|| / ||grad_v f||, a = grad_v f + H q, is three times its least value.

    Both are root mean squares over about 10 evaluations. Products that go wrong show there first: q
    then follows another equation than the one it solved. A false alarm costs one more look.
    """

    adjoint_square: float = 0.0
    slope_square: float = 0.0
    least: float = math.inf
    """The least ratio since the last look."""
    seen: int = 0
    """Evaluations since then."""

    _MEMORY = 0.9
    _TIMES = 3.0
    _SETTLED = 10
    _PATIENCE = 50
    # Ratios below this are what batches and the promised one per cent of a difference leave.
    _FLOOR = 0.05

    def after(self, adjoint_residual: float, slope: float) -> Alarm:
        """This alarm after one more evaluation with these norms."""
        a = self._MEMORY * self.adjoint_square + (1 - self._MEMORY) * adjoint_residual**2
        s = self._MEMORY * self.slope_square + (1 - self._MEMORY) * slope**2
        settled = self.seen >= self._SETTLED
        least = min(self.least, max(_ratio(a, s), self._FLOOR)) if settled else self.least
        return Alarm(a, s, least, self.seen + 1)

    @property
    def rings(self) -> bool:
        """Is it time for a look?"""
        ratio = _ratio(self.adjoint_square, self.slope_square)
        return self.seen > self._PATIENCE and ratio > self._TIMES * self.least

    def reset(self) -> Alarm:
        """After a look."""
        return Alarm(self.adjoint_square, self.slope_square)


def _ratio(adjoint_square: float, slope_square: float) -> float:
    """||a|| / ||grad_v f||; 0 where f has no slope, which says nothing of the products."""
    return math.sqrt(adjoint_square / slope_square) if slope_square > 0 else 0.0
