"""A bound on the length."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Number, checked_truth
from .faces import Face, check_dense
from .projection import Projection


class Ball(Projection):
    r"""||x||_2 <= radius, for each tensor of the level as a whole.

    Args:
        radius: > 0.
        rows: bound each row (entry along the first dimension) instead of the whole tensor.

    Example:
        >>> Ball(5.0).project(torch.tensor([6.0, 8.0]))
        tensor([3., 4.])
    """

    radius = Number("be a finite number > 0", "to fix x at 0 freeze it")

    def __init__(self, radius: float, rows: bool = False) -> None:
        self.radius = radius
        self.rows = checked_truth("rows", rows)

    def project(self, point: Tensor) -> Tensor:
        """Scaled down to the radius where longer."""
        wide = point.to(torch.promote_types(point.dtype, torch.float32))
        length = self._length(wide)
        outside = length > self.radius * (1 + self._tolerance(point))
        shrunk = wide * (self.radius / torch.where(outside, length, 1.0))
        return torch.where(outside, shrunk.to(point.dtype), point)

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """The tangent plane of the sphere where x is on it and -gradient points outward."""
        check_dense(gradient)
        dims = self._dims(point)
        wide = point.to(torch.promote_types(point.dtype, torch.float32))
        length = self._length(wide)
        outward = -(wide * gradient.to(wide.dtype)).sum(dims, keepdim=True)
        active = (length >= self.radius * (1 - self._tolerance(point))) & (outward > 0)
        normal = torch.where(active, wide / torch.where(active, length, 1.0), 0.0)
        curvature = torch.where(active, outward / self.radius**2, 0.0)

        def retract(before: Tensor, after: Tensor) -> Tensor:
            on_plane = before + flat.tangent(after - before)
            return self.project(torch.where(active, on_plane, after))

        flat = Face(retract, normal=normal, dims=dims, curvature=curvature)
        return flat

    def values(self, point: Tensor) -> Tensor:
        """(||x||^2 - radius^2) / (2 radius), about the distance outside."""
        dims = self._dims(point)
        squares = point.square().sum(dims) if dims else point.square()
        return (squares.reshape(-1) - self.radius**2) / (2 * self.radius)

    def _dims(self, point: Tensor) -> tuple[int, ...]:
        if self.rows and point.dim() < 2:
            raise ValueError(
                f"Ball(rows=True) needs rows, got a parameter of shape {tuple(point.shape)}; use "
                "Ball(radius) for the whole tensor or Box for single entries"
            )
        return tuple(range(1 if self.rows else 0, point.dim()))

    def _length(self, wide: Tensor) -> Tensor:
        dims = self._dims(wide)
        return torch.linalg.vector_norm(wide, dim=dims, keepdim=True) if dims else wide.abs()

    @staticmethod
    def _tolerance(point: Tensor) -> float:
        # A rescaled vector has the radius only up to the rounding of its entries.
        return 8 * torch.finfo(point.dtype).eps
