r"""How far the correction of the multiplier is trusted: what it forecasts against what comes.

Letters as in ``subspace.py``. With the images w_i at hand it is known what B'a should be at the
next evaluation if the system stood still. N and D are averages over about ten lower steps of the
squared error of that forecast and of the squared B'a before it, both in the span that is still
remembered and over ||a_before||^2 + ||a_now||^2, so that no change of units outlives them. One
error counts 2 at most, what a forecast no longer than a_before can miss by: the images of one odd
batch may forecast 1e11, and no average forgets that in ten steps.

.. math:: \text{gain} = \max(0, 1 - N / D)

Where v stands still the gain is 1; where batches or fast moves make the forecast worthless it is 0,
and what is left is the plain step. It starts at 0, with N = D: trust has to be earned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .averages import average
from .small_matrices import Vector, plus, times
from .subspace import PARALLEL, Products

_MEMORY = 0.9
# N = D at first, as much as a wrong forecast adds in ten steps. Without, a few lucky forecasts in
# the first steps of a noisy run throw nu far out along flat directions, from where it needs
# thousands of steps back (MNIST hyper-cleaning: 0.9 to 1.5 points of accuracy).
_DOUBT = 0.3
# ||x - y||^2 <= 2 (||x||^2 + ||y||^2).
WORST = 2.0
# Where the gain stays below 5 % (batches), the correction is tried in 10 lower steps of 100 only:
# the inner products would cost a tenth to a third of a step for nothing.
_WORTH, _PATIENCE, _TRIAL, _TRIAL_EVERY = 0.05, 20, 10, 100


@dataclass(frozen=True)
class Forecast:
    """What the correction expects of the next evaluation, and how past expectations came true."""

    missed: float = _DOUBT
    """N."""
    at_stake: float = _DOUBT
    """D."""
    gain: float = 0.0
    """What share of the correction is made."""
    along_multiplier: float = 0.0
    """<q, a> as expected."""
    along_move: float = 0.0
    """<q - q_-1, a> as expected."""
    along_multiplier_before: float = 0.0
    """<q, a> at the evaluation before."""
    along_move_before: float = 0.0
    """<q - q_-1, a> there."""
    square_before: float = 0.0
    """||a||^2 there."""
    was_made: bool = False
    """Was there a forecast for this evaluation?"""
    idle: int = 0
    """Lower steps since the gain was last worth having."""

    def is_due(self, steps: int) -> bool:
        """Is the next evaluation, the ``steps``-th from 0, to be corrected or forecast?"""
        return self.idle < _PATIENCE or steps % _TRIAL_EVERY >= _TRIAL_EVERY - _TRIAL

    def resting(self) -> Forecast:
        """After a lower step without."""
        return replace(self, was_made=False, idle=self.idle + 1)


NOTHING_FORECAST = Forecast()


def judged(forecast: Forecast, products: Products) -> Forecast:
    """With the gain that the latest evaluation leaves it."""
    unit = forecast.square_before + products.residual_square
    if not forecast.was_made or not unit > 0:
        return replace(forecast, idle=forecast.idle + 1)
    first, second = of_last_span(products.slopes)
    missing = first - forecast.along_multiplier, second - forecast.along_move
    error = in_last_span(products, *missing)
    before = in_last_span(products, forecast.along_multiplier_before, forecast.along_move_before)
    missed = average(forecast.missed, min(error / unit, WORST), _MEMORY)
    at_stake = average(forecast.at_stake, before / unit, _MEMORY)
    gain = max(0.0, 1.0 - missed / at_stake) if at_stake > 0 else 0.0
    idle = 0 if gain > _WORTH else forecast.idle + 1
    return replace(forecast, missed=missed, at_stake=at_stake, gain=gain, idle=idle)


def expecting(
    forecast: Forecast, products: Products, coefficients: Vector, step: float
) -> Forecast:
    """Of B'a once q has moved by B c - step * a_g."""
    after = plus(products.slopes, 1.0, times(products.mixed, coefficients))
    bent = plus(products.image_slopes, 1.0, times(products.images, coefficients))
    multiplier, move, _ = plus(after, -step, bent)
    multiplier_before, move_before, _ = products.slopes
    return replace(
        forecast,
        along_multiplier=multiplier,
        along_move=move,
        along_multiplier_before=multiplier_before,
        along_move_before=move_before,
        square_before=products.residual_square,
        was_made=True,
    )


def of_last_span(slopes: Vector) -> tuple[float, float]:
    """<q_-1, x> and <q_-1 - q_-2, x> from B'x: of the directions that the last span had, too."""
    multiplier, move, last_move = slopes  # q_-1 = q - (q - q_-1)
    return multiplier - move, last_move


def in_last_span(products: Products, first: float, second: float) -> float:
    """||P x||^2, P the projection on q_-1 and q_-1 - q_-2.

    Args:
        products: of the span that holds both.
        first: <q_-1, x>.
        second: <q_-1 - q_-2, x>.
    """
    (qq, qm, qp), (_, mm, mp), (*_, pp) = products.basis
    return _square((qq - 2 * qm + mm, qp - mp, pp), first, second)


def _square(metric: tuple[float, float, float], first: float, second: float) -> float:
    """||P a||^2, P the projection on the span of two vectors.

    Args:
        metric: the inner products of the vectors: first with itself, first with second, second.
        first: that of a with the first.
        second: with the second.
    """
    aa, ab, bb = metric
    if not aa > 0:
        return second * second / bb if bb > 0 else 0.0
    along, rest = first * first / aa, bb - ab * ab / aa
    if not rest > PARALLEL * bb:
        return along
    return along + (second - ab / aa * first) ** 2 / rest
