"""Bounds, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .faces import Face, check_dense
from .projection import Projection


class Box(Projection):
    """low <= x <= high, entry by entry.

    Args:
        low: a number, or a tensor that broadcasts to every parameter of the level; may be -inf.
        high: likewise; may be inf.

    Example:
        >>> Box(0.0, 1.0).project(torch.tensor([-2.0, 0.5, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        self.low, self.high = _bound("low", low), _bound("high", high)
        if not bool((self.low <= self.high).all()):  # also catches NaN
            raise ValueError(f"Box needs low <= high, got low={low!r} and high={high!r}")

    def _bounds(self, point: Tensor) -> tuple[Tensor, Tensor]:
        try:
            low, high = self.low.to(point), self.high.to(point)
            return low.expand_as(point), high.expand_as(point)
        except RuntimeError:
            raise ValueError(
                f"Box has bounds of shape {tuple(self.low.shape)} and {tuple(self.high.shape)}, "
                f"which do not broadcast to a parameter of shape {tuple(point.shape)}; a "
                "constraint applies to every tensor of its level"
            ) from None

    def project(self, point: Tensor) -> Tensor:
        """Entries clipped to their bounds."""
        low, high = self._bounds(point)
        return torch.minimum(torch.maximum(point, low), high)

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """Holds entries at a bound whose -gradient points outward."""
        check_dense(gradient)
        low, high = self._bounds(point)
        held = ((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0))

        def retract(before: Tensor, after: Tensor) -> Tensor:
            return self.project(torch.where(held, before, after))

        return Face(retract, moving=~held)

    def values(self, point: Tensor) -> Tensor:
        """Low - x and x - high, where finite."""
        low, high = self._bounds(point)
        return torch.cat([(low - point)[low.isfinite()], (point - high)[high.isfinite()]])


def _bound(name: str, value: Any) -> Tensor:
    try:
        bound = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        bound = torch.zeros((), dtype=torch.complex64)
    if bound.is_complex():
        raise TypeError(
            f"{name} must be a number or a real tensor, got {value!r}; leave a side open by inf"
        )
    return bound


class NonNegative(Box):
    """x >= 0, entry by entry."""

    def __init__(self) -> None:
        super().__init__(0.0, math.inf)
