"""Does a closure return the same when it is called again?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NondeterministicClosureError
from ..tensors import OptionalPair, dense, norm

_APART = 0.1


def check_repeats(value: Tensor, again: Tensor, remedy: str) -> None:
    """Raise ``NondeterministicClosureError`` unless two losses at one point agree.

    Args:
        value: g, 0-d.
        again: g from a second call with the same random numbers; equal to the square root of the
            precision of the dtype, relative and absolute, as sums may be ordered differently.
        remedy: who needs the repetition, and what to do.
    """
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    # What is not finite is named by who measures it.
    if bool(value.isfinite()) and not torch.allclose(value, again, rtol=tolerance, atol=tolerance):
        raise NondeterministicClosureError(
            f"the lower closure returned {value.item():.9g} and, called again at the same point "
            f"with the same random numbers, {again.item():.9g}. {remedy}"
        )


def check_gradient_repeats(
    first: tuple[Tensor, OptionalPair], again: tuple[Tensor, OptionalPair], remedy: str
) -> None:
    """The same for a loss with its gradient: zero weights have log 2 on every batch.

    Another batch changes most of a gradient, so a tenth of it says enough; what is below the
    rounding of the loss says nothing.

    Args:
        first: g and its gradient.
        again: from a second call.
        remedy: as above.
    """
    (value, gradient), (repeated, other) = first, again
    check_repeats(value, repeated, remedy)
    pairs = [
        (a, b)
        for part, twin in zip(gradient, other, strict=True)
        for a, b in zip(part, twin, strict=True)
        if a is not None and b is not None
    ]
    # One tensor after the other: copies of all of them would be the most memory of the run.
    size = float(norm([norm([dense(a)]) for a, _ in pairs]))
    gap = float(norm([norm([dense(a) - dense(b)]) for a, b in pairs]))
    rounding = torch.finfo(value.dtype).eps ** 0.5 * abs(float(value))
    if gap > max(_APART * size, rounding):
        raise NondeterministicClosureError(
            "the lower closure, called again at the same point with the same random numbers, "
            f"returned the same loss but another gradient, {gap:.2g} off where it has {size:.2g}. "
            f"{remedy}"
        )
