"""What can go wrong, each with a name of its own and a place in the documentation."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import warnings
from types import FrameType
from typing import ClassVar

import torch


class _Documented(Exception):
    """Ends its message with the page that has symptom, cause and remedy."""

    page: ClassVar[str] = "docs/symptoms.md"

    def message(self) -> str:
        """What happened and what to try, without the page."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message()} (see {self.page})".lstrip()


class BilevelError(_Documented, RuntimeError):
    """Base class of the errors this package raises while it computes.

    ``page`` is where the documentation has symptom, cause and remedy, and ends the message.

    Example:
        >>> print(NonFiniteError("upper loss f is nan in step 3"))
        upper loss f is nan in step 3 (see docs/symptoms.md#not-finite)
    """


class NonFiniteError(BilevelError):
    """A loss, residual or gradient is infinite or NaN; raised before anything was changed."""

    page = "docs/symptoms.md#not-finite"


class AdjointError(NonFiniteError):
    """The adjoint equation has no finite solution by this method; nothing was changed.

    Args:
        status: how the solve ended: ``"negative_curvature"``, ``"diverged"``, ``"not_finite"``.
        reason: what happened and what to try.
        place: where.
    """

    page = "docs/symptoms.md#no-adjoint"

    def __init__(self, status: str, reason: str, place: str) -> None:
        super().__init__(status, reason, place)
        self.status = status
        self.reason = reason

    def message(self) -> str:
        return "adjoint: {1}; {2}".format(*self.args)


class UnusedParameterError(BilevelError):
    """Neither the upper loss nor the lower residual depends on an upper parameter."""

    page = "docs/symptoms.md#unused-parameter"


class DoubleBackwardError(BilevelError):
    """An operation of the lower loss has no (trustworthy) second derivative in autograd.

    Args:
        reason: what is missing.
        remedy: what to do, unless someone does it already.
    """

    page = "docs/symptoms.md#no-second-derivative"

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason

    def message(self) -> str:
        return ". ".join(part for part in self.args if part)


class NondeterministicClosureError(BilevelError):
    """Two evaluations of a closure at one point disagree, so a difference of them is noise."""

    page = "docs/symptoms.md#nondeterministic-closure"


class WorkerError(BilevelError):
    """Another of the workers that share this problem failed; nothing was changed on any."""

    page = "docs/symptoms.md#another-worker-failed"


class BilevelWarning(_Documented, RuntimeWarning):
    """The computation went on, but a result deserves a second look."""

    page = "docs/symptoms.md#warnings"


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
