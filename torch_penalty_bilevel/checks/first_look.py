"""The first step looks at what both losses depend on; their closures need not be called for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..curvature import Curvature, Loss
from ..curvature.micro_batches import MeanLoss, bare
from ..errors import warn
from ..penalties import Losses
from ..tensors import Pair
from ..undo.random_state import RandomState


class _Remembered:
    """A loss that after ``open`` returns its first value, graph included, once more.

    Only if it was called once before, and at the point where it was: a closure that draws a batch
    would otherwise lose one. The random generators go where the first call left them.
    """

    def __init__(self, loss: Any, at: Pair, name: str) -> None:
        self._loss, self._at, self._name = loss, (*at.upper, *at.lower), name
        self._calls, self._is_open = 0, False
        self._value: Any = None
        self._after: RandomState | None = None
        self._versions: list[int] = []

    def __call__(self, upper: Any, lower: Any) -> Any:
        value, again = self._value, self._is_open and self._calls == 1
        self._calls += 1
        self._value = None
        if again and self._after and self._versions == [p._version for p in self._at]:
            self._after.restore()
            return value
        fresh = self._loss(upper, lower)
        if self._calls == 1:
            self._value, self._after = fresh, RandomState(p.device for p in self._at)
            self._versions = [p._version for p in self._at]
        return fresh

    def open(self) -> None:
        self._is_open = True


class _Compared(_Remembered):
    """A loss that is called again instead; warns if it then returns something else."""

    def __call__(self, upper: Any, lower: Any) -> Any:
        first, again = self._value, self._is_open and self._calls == 1
        self._calls += 1
        self._value = None
        fresh = self._loss(upper, lower)
        if self._calls == 1:
            self._value = _numbers(fresh)
        elif again and not _agree(first, _numbers(fresh)):
            warn(
                f"{self._name}, called again at the same point with the same random numbers, "
                "returned something else (next(loader) inside?). This curvature calls it once more "
                "in the first step; draw the batch outside",
            )
        return fresh


class FirstLook:
    """Losses for ``check_dependence`` and, after ``open``, for the evaluation that follows it.

    Args:
        losses: f and g, or f and Phi.
        at: where both look.
        engine: one for pure functions looks at other graphs than it uses; one that takes
            differences moves v under the graph of f.
    """

    def __init__(self, losses: Losses, at: Pair, engine: Curvature) -> None:
        lasts = engine.reads_live and not engine.takes_differences
        kind = _Remembered if lasts else _Compared
        self._seen: list[_Remembered] = []

        def seen(loss: Any, name: str) -> Any:
            if isinstance(loss, MeanLoss):  # whose graphs, or maps, would all live at once
                return loss
            self._seen.append(kind(loss, at, name))
            return self._seen[-1]

        upper: Loss = seen(losses.upper, "upper_closure")
        self.losses = losses._replace(upper=upper, lower=seen(losses.lower, "lower_closure"))

    def open(self) -> None:
        """From now on what was seen is handed out."""
        for loss in self._seen:
            loss.open()


def _numbers(value: Any) -> list[Tensor]:
    parts: list[Tensor] = [value] if isinstance(value, Tensor) else list(value)
    return [bare(part) for part in parts]


def _agree(first: list[Tensor], again: list[Tensor]) -> bool:
    """To the square root of the dtype's precision, as sums may be ordered differently."""

    def close(a: Tensor, b: Tensor) -> bool:
        allowed = torch.finfo(a.dtype).eps ** 0.5
        return torch.allclose(a, b, rtol=allowed, atol=allowed, equal_nan=True)

    return all(close(a, b) for a, b in zip(first, again, strict=True))
