"""What can go wrong, each with a name of its own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import warnings
from types import FrameType

import torch


class BilevelError(RuntimeError):
    """Base class of the errors this package raises while it computes."""


class NonFiniteError(BilevelError):
    """A loss, residual or gradient is infinite or NaN; raised before anything was changed."""


class AdjointError(NonFiniteError):
    """The adjoint equation has no finite solution by this method; nothing was changed.

    Args:
        status: how the solve ended: ``"negative_curvature"``, ``"diverged"``, ``"not_finite"``.
        reason: what happened and what to try.
        place: where.
    """

    def __init__(self, status: str, reason: str, place: str) -> None:
        super().__init__(status, reason, place)
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return "adjoint: {1}; {2}".format(*self.args)


class UnusedParameterError(BilevelError):
    """Neither the upper loss nor the lower residual depends on an upper parameter."""


class DoubleBackwardError(BilevelError):
    """An operation of the lower loss has no (trustworthy) second derivative in autograd.

    Args:
        reason: what is missing.
        remedy: what to do, unless someone does it already.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason

    def __str__(self) -> str:
        return ". ".join(part for part in self.args if part)


class NondeterministicClosureError(BilevelError):
    """Two evaluations of a closure at one point disagree, so a difference of them is noise."""


class WorkerError(BilevelError):
    """Another of the workers that share this problem failed; nothing was changed on any."""


class BilevelWarning(RuntimeWarning):
    """The computation went on, but a result deserves a second look."""


_INSIDE = (
    f"{pathlib.Path(__file__).parent}{os.sep}",
    f"{pathlib.Path(torch.__file__).parent}{os.sep}",
    contextlib.__file__,
)


def warn(message: str, category: type[Warning] = BilevelWarning) -> None:
    """A warning at the line of the user's that led here, however deep this is."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
