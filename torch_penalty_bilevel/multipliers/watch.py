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
import warnings

from ..errors import BilevelWarning
from ..evaluation import Norms

START = dict.fromkeys(("adjoint_square", "slope_square", "slope", "warned", "restarts"), 0.0)
"""What the watch remembers in a rule's scalars: mean squares of ||a|| and ||grad_v f||, the fading
maximum of ||grad_v f||, whether the present trouble was reported, and how many restarts."""

SUSPICIOUS = 10.0
"""The ratio from which a multiplier that moves in every step is reported."""

_HOPELESS = 1000.0
_RECOVERED = 0.2  # of the limit: below it the next trouble is another one, and reported again
_NEGLIGIBLE = 1e-3  # of what grad_v f has been
_MEMORY = 0.99
_PATIENCE = 100


def seen(scalars: dict[str, float], norms: Norms, steps: int) -> dict[str, float]:
    """``scalars`` with the averages after one more evaluation, the ``steps``-th from 0."""
    adjoint = _average(scalars["adjoint_square"], norms.adjoint_residual)
    slope = _average(scalars["slope_square"], norms.slope)
    faded = scalars["slope"] * (steps + _PATIENCE) / (steps + _PATIENCE + 1)
    held = max(math.sqrt(slope), faded)
    return scalars | {"adjoint_square": adjoint, "slope_square": slope, "slope": held}


def looked_at(
    scalars: dict[str, float],
    norms: Norms,
    steps: int,
    limit: float = SUSPICIOUS,
    patience: int = _PATIENCE,
) -> dict[str, float]:
    """``scalars`` after a look; warns once per trouble if the ratio has long been above a limit."""
    if _ratio(scalars) < _RECOVERED * limit:
        return scalars | {"warned": 0.0}
    troubled = steps >= patience and _ratio(scalars) > limit and _matters(scalars, norms)
    if scalars["warned"] or not troubled:
        return scalars
    _warn(
        f"||grad_v f + H q|| has been {_ratio(scalars):.2g} times ||grad_v f|| on average over the "
        f"last 100 lower steps (step {steps}), and q = 0 has 1: the hypergradient is not to be "
        "trusted. Lower the learning rate of the upper level, take more lower_steps or larger "
        "batches; optimizer.check_hypergradient(...) looks for the cause"
    )
    return scalars | {"warned": 1.0}


def is_hopeless(scalars: dict[str, float], steps: int) -> bool:
    """Would the multiplier reach the adjoint sooner from zero?"""
    return steps >= _PATIENCE and _ratio(scalars) > _HOPELESS


def restarted(scalars: dict[str, float], norms: Norms) -> dict[str, float]:
    """``scalars`` of a multiplier that starts again at zero; warns, unless f has just gone."""
    if _matters(scalars, norms):
        _warn(
            f"||grad_v f + H q|| has grown to {_ratio(scalars):.2g} times ||grad_v f||: the "
            "multiplier diverged and restarts from zero. Lower the learning rates; is g bounded "
            "below in v?"
        )
    restarts = scalars["restarts"] + 1.0
    return scalars | {"adjoint_square": scalars["slope_square"], "restarts": restarts}


def _average(old: float, length: float) -> float:
    return _MEMORY * old + (1 - _MEMORY) * length**2


def _matters(scalars: dict[str, float], norms: Norms) -> bool:
    adjoint = math.sqrt(scalars["adjoint_square"])
    return norms.slope > 0 and adjoint > _NEGLIGIBLE * scalars["slope"]


def _ratio(scalars: dict[str, float]) -> float:
    slope = scalars["slope_square"]
    return math.sqrt(scalars["adjoint_square"] / slope) if slope > 0 else 0.0


def _warn(message: str) -> None:
    warnings.warn(message, BilevelWarning, stacklevel=6)
