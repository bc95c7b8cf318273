r"""The watch over the certificate ||a||, a = grad_v f + H q.

A multiplier of zero has ||a|| = ||grad_v f||, so the ratio of the two says what the multiplier is
worth: 0 at the exact adjoint, 1 for nothing, more than 1 for worse than nothing. Both are root
mean squares over about 100 lower steps, in which minibatch noise counts: MNIST hyper-cleaning with
batches of 200 sits between 0.9 and 1.7 while it works.

A ratio of two small numbers says nothing. Where f is silent (grad_v f = 0 at this step) or ||a|| is
far below what grad_v f has been, nothing is reported: a run that has solved its problem, or whose
hinge is satisfied, is not ill. What has been is a maximum that fades like 1 / (t + 100):
the averages need as long to fill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import warn
from ..evaluation import Norms
from .averages import average

SUSPICIOUS = 10.0
"""The ratio from which a multiplier that moves in every step is reported."""

REMEDY = "Lower the learning rate of the upper level, take more lower_steps or larger batches"

_HOPELESS = 1000.0
_RECOVERED = 0.2  # of the limit: below it the next trouble is another one, and reported again
_NEGLIGIBLE = 1e-3  # of what grad_v f has been
_MEMORY = 0.99
_PATIENCE = 100


@dataclass(frozen=True)
class Watch:
    """What the watch remembers."""

    adjoint_square: float = 0.0
    """Mean square of ||a||."""
    slope_square: float = 0.0
    """Mean square of ||grad_v f||."""
    slope: float = 0.0
    """The fading maximum of ||grad_v f||."""
    warned: bool = False
    """Was the present trouble reported?"""
    restarts: int = 0
    """Of the multiplier."""

    def seen(self, norms: Norms, steps: int) -> Watch:
        """After one more evaluation, the ``steps``-th from 0."""
        adjoint = average(self.adjoint_square, norms.adjoint_residual**2, _MEMORY)
        slope = average(self.slope_square, norms.slope**2, _MEMORY)
        faded = self.slope * (steps + _PATIENCE) / (steps + _PATIENCE + 1)
        held = max(math.sqrt(slope), faded)
        return Watch(adjoint, slope, held, self.warned, self.restarts)

    def looked_at(
        self,
        norms: Norms,
        steps: int,
        limit: float = SUSPICIOUS,
        patience: int = _PATIENCE,
        remedy: str = REMEDY,
    ) -> Watch:
        """After a look; warns once per trouble if the ratio has long been above a limit."""
        if self.ratio < _RECOVERED * limit:
            return replace(self, warned=False) if self.warned else self
        troubled = steps >= patience and self.ratio > limit and self._matters(norms)
        if self.warned or not troubled:
            return self
        warn(
            f"||grad_v f + H q|| has been {self.ratio:.2g} times ||grad_v f|| on average over the "
            f"last 100 lower steps (step {steps}), and q = 0 has 1: the hypergradient is not to be "
            f"trusted. {remedy}; optimizer.check_hypergradient(...) looks for the cause"
        )
        return replace(self, warned=True)

    def is_hopeless(self, steps: int) -> bool:
        """Would the multiplier reach the adjoint sooner from zero?"""
        return steps >= _PATIENCE and self.ratio > _HOPELESS

    def restarted(self, norms: Norms) -> Watch:
        """Of a multiplier that starts again at zero; warns, unless f has just gone."""
        if self._matters(norms):
            warn(
                f"||grad_v f + H q|| has grown to {self.ratio:.2g} times ||grad_v f||: the "
                "multiplier diverged and restarts from zero. Lower the learning rates; is g "
                "bounded below in v?"
            )
        return replace(self, adjoint_square=self.slope_square, restarts=self.restarts + 1)

    @property
    def ratio(self) -> float:
        """Root mean squares of ||a|| over those of ||grad_v f||; 0 where f is silent."""
        if self.slope_square == 0:
            return 0.0
        return math.sqrt(self.adjoint_square / self.slope_square)

    def steepest(self, norms: Norms) -> float:
        """S of ``LeastSquares``, in which the present evaluation counts at once."""
        lately = math.sqrt(self.adjoint_square + self.slope_square)
        return max(self.slope, lately, math.hypot(norms.adjoint_residual, norms.slope))

    def _matters(self, norms: Norms) -> bool:
        return norms.slope > 0 and math.sqrt(self.adjoint_square) > _NEGLIGIBLE * self.slope
