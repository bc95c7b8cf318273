"""Bounds on the entries and on the length together."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import Ball
from .box import Box
from .faces import Face, check_dense
from .projection import Projection


class BoxAndBall(Projection):
    r"""low <= x <= high, entry by entry, and ||x||_2 <= radius.

    The nearest point of both is clip(s x) with one s in (0, 1] for each length,

    .. math:: s = 1 / (1 + \mu), \qquad \mu \ge 0 \text{ the multiplier of } \|x\|^2 / 2

    and not the clipped point of the ball, nor the scaled point of the box, which are in the set but
    farther away. s is exact, by sorting: entry i leaves its bound b_i where s < b_i / x_i.

    Args:
        low: <= 0, a number or a tensor that broadcasts to every parameter of the level; may be
            -inf.
        high: >= 0, likewise; may be inf.
        radius: > 0.
        rows: bound the length of each row (entry along the first dimension) instead of that of the
            whole tensor.

    Raises:
        ValueError: 0 is outside of the box (the two need not meet then); as ``Box`` and ``Ball``.

    Example:
        >>> BoxAndBall(-1.0, 1.0, radius=1.25).project(torch.tensor([5.0, 1.5, 0.0]))
        tensor([1.0000, 0.7500, 0.0000])
    """

    def __init__(
        self, low: float | Tensor, high: float | Tensor, radius: float, rows: bool = False
    ) -> None:
        self._box, self._ball = Box(low, high), Ball(radius, rows)
        self.radius, self.rows = self._ball.radius, rows
        if not bool((self._box.low <= 0).all()) or not bool((self._box.high >= 0).all()):
            raise ValueError(
                f"BoxAndBall needs low <= 0 <= high, got low={low!r} and high={high!r}; shift x so "
                "that the centre of the ball is in the box"
            )

    def project(self, point: Tensor) -> Tensor:
        """Clip(s x), in which s is 1 where the clipped x is short enough."""
        return self._project(point)

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        r"""Holds entries at a bound that -(gradient + lambda x) pushes outward.

        Lambda >= 0 keeps the move on the tangent plane of the sphere where x is on it. An entry at
        a bound moves inwards once lambda > -g_i / x_i, so lambda is the mean of -g_i / x_i over the
        entries that move, weighted by x_i^2: found by sorting, as in ``Simplex``.
        """
        check_dense(gradient)
        dims = self._ball._dims(point)
        x, low, high = self._rows(point)
        g = self._as_rows(gradient.to(x.dtype))
        bound = (x <= low) | (x >= high)
        outward = ((x <= low) & (g > 0)) | ((x >= high) & (g < 0))
        # The sphere does not pull at an entry that is 0, nor a row that stays.
        asked = g.any(-1, keepdim=True)
        on_sphere = asked & (self._length(x) >= self.radius * (1 - _rounding(x, point.dtype)))
        pull, rows = torch.zeros_like(x[:, :1]), on_sphere.squeeze(1).nonzero().squeeze(1)
        pull[rows] = self._pull(x[rows], g[rows], bound[rows])
        active = pull > 0
        moving = torch.where(active & bound & (x != 0), -g / x <= pull, ~outward)
        normal = torch.where(active & moving, x, 0.0)
        normal = normal / torch.where(active, self._length(normal), 1.0)
        shape = tuple(1 if d in dims else n for d, n in enumerate(point.shape))
        m, curved = moving.reshape(point.shape), active.reshape(shape)

        def retract(before: Tensor, after: Tensor) -> Tensor:
            after = torch.where(m, after, before)
            on_plane = before + flat.tangent(after - before)
            return self._project(torch.where(curved, on_plane, after), ~moving)

        flat = Face(retract, m, normal.reshape(point.shape), dims, pull.reshape(shape))
        return flat

    def values(self, point: Tensor) -> Tensor:
        """Those of the box, then those of the ball."""
        return torch.cat([self._box.values(point), self._ball.values(point)])

    def _project(self, point: Tensor, held: Tensor | None = None) -> Tensor:
        """Onto the part of the set in which the ``held`` entries of the rows stay."""
        x, low, high = self._rows(point)
        if held is not None:
            low, high = torch.where(held, x, low), torch.where(held, x, high)
        clipped = torch.clamp(x, low, high)
        outside = self._length(clipped) > self.radius * (1 + _rounding(x, point.dtype))
        rows = outside.squeeze(1).nonzero().squeeze(1)  # few: rows out of the batch have not moved
        x, low, high = x[rows], low[rows], high[rows]
        clipped[rows] = torch.clamp(self._scale(x, low, high) * x, low, high)
        nearest = clipped.reshape(point.shape)
        return torch.where(nearest == point, point, nearest.to(point.dtype))

    @staticmethod
    def _pull(x: Tensor, g: Tensor, bound: Tensor) -> Tensor:
        """Lambda of rows on the sphere; 0 where the box holds them."""
        wanted = torch.where(bound, -g / torch.where(x != 0, x, 1.0), -torch.inf)
        key = torch.where(x != 0, wanted, torch.inf)
        order = key.argsort(-1)
        weights = x.square().gather(-1, order).cumsum(-1)
        means = (-g * x).gather(-1, order).cumsum(-1) / torch.where(weights > 0, weights, 1.0)
        joins = key.gather(-1, order)[:, 1:] < means[:, :-1]
        last = joins.long().cumprod(-1).sum(-1, keepdim=True)
        free = (key == -torch.inf).any(-1, keepdim=True)
        return torch.where(free, means.gather(-1, last).clamp(min=0), 0.0)

    def _scale(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The s at which clip(s x) has the length of the radius; of use where it is longer at 1."""
        square = self.radius**2
        end = torch.where(x > 0, high, low)
        # Entry i is at its end from s = reaches_i on; one that is held is there at s = 0.
        reaches = torch.where(x != 0, end / torch.where(x != 0, x, 1.0), torch.inf)
        reaches = torch.where(low == high, 0.0, reaches)
        ordered, order = reaches.sort(-1)
        finite = ordered < torch.inf
        squares = x.square().gather(-1, order)
        ended = torch.where(finite, end.square().gather(-1, order), 0.0).cumsum(-1)
        moving = squares.flip(-1).cumsum(-1).flip(-1) - squares
        short = finite & (ended + ordered.square() * moving <= square)
        s = torch.where(short, ordered, 0.0).amax(-1, keepdim=True)
        # The sums along the row round: with those of the entries at their end anew s is exact.
        for _ in range(2):
            at_end = reaches <= s
            left = square - torch.where(at_end, end.square(), 0.0).sum(-1, keepdim=True)
            over = torch.where(at_end, 0.0, x.square()).sum(-1, keepdim=True)
            s = torch.where(over > 0, left.clamp(min=0) / torch.where(over > 0, over, 1.0), 1.0)
            s = s.sqrt()
        return s

    def _rows(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The point and its bounds as matrices, a row for each length, in at least float32."""
        self._ball._dims(point)  # raises without rows
        wide = torch.promote_types(point.dtype, torch.float32)
        x, low, high = (self._as_rows(t.to(wide)) for t in (point, *self._box._bounds(point)))
        return x, low, high

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if self.rows else tensor.reshape(1, -1)

    @staticmethod
    def _length(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _rounding(x: Tensor, dtype: torch.dtype) -> float:
    """Of the length of a row in ``dtype``; sums over long rows round more."""
    return torch.finfo(dtype).eps * (8 + x.shape[-1] ** 0.5)
