"""Does a closure return the same when it is called again?"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NondeterministicClosureError


def check_repeats(value: Tensor, again: Tensor, remedy: str) -> None:
    """Raise ``NondeterministicClosureError`` unless two losses at one point agree.

    Args:
        value: g, 0-d.
        again: g from a second call with the same random numbers; equal to the square root of the
            precision of the dtype, relative and absolute, as sums may be ordered differently.
        remedy: who needs the repetition, and what to do.
    """
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    if not torch.allclose(value, again, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise NondeterministicClosureError(
            f"the lower closure returned {value.item():.9g} and, called again at the same point "
            f"with the same random numbers, {again.item():.9g}. {remedy}"
        )
