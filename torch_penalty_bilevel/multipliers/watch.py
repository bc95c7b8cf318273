r"""The watch over the certificate ||a||, a = grad_v f + H nu.

A multiplier of zero has ||a|| = ||grad_v f||, so the ratio of the two says what the multiplier is
worth: 0 at the exact adjoint, 1 for nothing, more than 1 for worse than nothing. Both are root
mean squares over about 100 lower steps, in which minibatch noise counts: MNIST hyper-cleaning with
batches of 200 sits between 0.9 and 1.7 while it works.
"""

from __future__ import annotations

import math
import warnings

from ..errors import BilevelWarning

START = {"warned": 0.0}
"""What the watch remembers in a rule's scalars."""

_PATIENCE = 100
_SUSPICIOUS = 10.0
_HOPELESS = 1000.0


def looked_at(scalars: dict[str, float], steps: int) -> dict[str, float]:
    """``scalars`` after a look; warns once if the multiplier has long been worse than none."""
    if scalars["warned"] or not _exceeds(scalars, steps, _SUSPICIOUS):
        return scalars
    _warn(
        f"||grad_v f + H q|| has been {_ratio(scalars):.2g} times ||grad_v f|| on average over the "
        f"last 100 lower steps (step {steps}): the hypergradient is not to be trusted. "
        "Lower the learning rate of the upper level, take more lower_steps or larger batches; "
        "optimizer.check_hypergradient(...) looks for the cause"
    )
    return scalars | {"warned": 1.0}


def is_hopeless(scalars: dict[str, float], steps: int) -> bool:
    """Would the multiplier reach the adjoint sooner from zero?"""
    return _exceeds(scalars, steps, _HOPELESS)


def restarted(scalars: dict[str, float]) -> dict[str, float]:
    """``scalars`` of a multiplier that starts again at zero; warns."""
    _warn(
        f"||grad_v f + H q|| has grown to {_ratio(scalars):.2g} times ||grad_v f||: the multiplier "
        "diverged and restarts from zero. Lower the learning rates; is g bounded below in v?"
    )
    return scalars | {"adjoint_square": scalars["slope_square"], "warned": 1.0}


def _exceeds(scalars: dict[str, float], steps: int, times: float) -> bool:
    return steps >= _PATIENCE and _ratio(scalars) > times


def _ratio(scalars: dict[str, float]) -> float:
    slope = scalars["slope_square"]
    return math.sqrt(scalars["adjoint_square"] / slope) if slope > 0 else 0.0


def _warn(message: str) -> None:
    warnings.warn(message, BilevelWarning, stacklevel=6)
