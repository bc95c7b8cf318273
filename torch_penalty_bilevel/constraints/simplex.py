"""Distributions, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .faces import Face, check_dense
from .projection import Projection


class Simplex(Projection):
    """Non-negative entries that sum to 1 along the last dimension: each row is a distribution.

    The projection is exact (by sorting, Held, Wolfe & Crowder 1974). A row whose gradient is zero
    does not move; within a row all entries compete, so an entry without a gradient of its own does.

    Example:
        >>> Simplex().project(torch.tensor([0.5, 1.5, -1.0]))
        tensor([0., 1., 0.])
    """

    def project(self, point: Tensor) -> Tensor:
        """The nearest distribution, row by row."""
        self._check(point)
        return self._project(point, torch.ones_like(point, dtype=torch.bool))

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """Holds zeros that would not grow: those whose gradient is at least the moving mean's."""
        check_dense(gradient)
        self._check(point)
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        free = point > 0
        # Zeros join the free entries in the order of their gradients while below the mean so far.
        order = torch.where(free, -math.inf, wide).argsort(-1)
        means = wide.gather(-1, order).cumsum(-1) / _counting(wide)
        joins = ~free.gather(-1, order)
        joins[..., 1:] &= wide.gather(-1, order)[..., 1:] < means[..., :-1]
        last = (free.sum(-1, keepdim=True) + joins.sum(-1, keepdim=True)).clamp(min=1) - 1
        moving = free | (wide <= means.gather(-1, last))
        normal = moving / moving.sum(-1, keepdim=True).clamp(min=1).to(wide.dtype).sqrt()

        def retract(before: Tensor, after: Tensor) -> Tensor:
            del before
            return self._project(after, moving)

        return Face(retract, moving=moving, normal=normal, dims=(-1,))

    def values(self, point: Tensor) -> Tensor:
        """-x; that the entries sum to 1 is in the coordinates."""
        return -point.reshape(-1)

    def free(self, point: Tensor) -> Tensor:
        """Z of x = 1/n + N z, with N an orthonormal basis of the vectors that sum to zero."""
        if point.dim() == 0 or point.shape[-1] < 2:
            raise ValueError(
                f"Simplex needs at least two entries per row, got shape {tuple(point.shape)}"
            )
        return (point - 1 / point.shape[-1]) @ _basis(point)

    def inside(self, coordinates: Tensor) -> Tensor:
        """1/n + N z."""
        return self.direction(coordinates) + 1 / (coordinates.shape[-1] + 1)

    def direction(self, coordinates: Tensor) -> Tensor:
        """N z."""
        return coordinates @ _basis(coordinates, 1).T

    @staticmethod
    def _check(point: Tensor) -> None:
        if point.dim() == 0:
            raise ValueError("Simplex needs a tensor with a last dimension, got a 0-d parameter")

    @staticmethod
    def _project(point: Tensor, moving: Tensor) -> Tensor:
        """Onto the face of the simplex that ``moving`` spans."""
        moving = moving | ~moving.any(-1, keepdim=True)
        wide = point.to(torch.promote_types(point.dtype, torch.float32))
        tolerance = torch.finfo(point.dtype).eps * (4 + point.shape[-1] ** 0.5)
        inside = (wide >= 0) & (moving | (wide == 0))
        feasible = inside.all(-1, keepdim=True) & (
            (wide.sum(-1, keepdim=True) - 1).abs() <= tolerance
        )
        ordered = torch.where(moving, wide, -math.inf).sort(-1, descending=True).values
        thresholds = (ordered.cumsum(-1) - 1) / _counting(wide)
        support = (ordered > thresholds).sum(-1, keepdim=True).clamp(min=1)  # NaN counts as no
        threshold = thresholds.gather(-1, support - 1)
        projected = torch.where(moving, (wide - threshold).clamp(min=0), 0.0)
        return torch.where(feasible, point, projected.to(point.dtype))


def _basis(like: Tensor, added: int = 0) -> Tensor:
    """N: n x (n - 1), orthonormal, columns sum to zero; n is the last dimension plus ``added``."""
    n = like.shape[-1] + added
    rows = torch.eye(n, dtype=torch.float64) - 1 / n
    return torch.linalg.qr(rows[:, : n - 1]).Q.to(like)


def _counting(like: Tensor) -> Tensor:
    """1, 2, ... along the last dimension."""
    return torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=like.dtype)
