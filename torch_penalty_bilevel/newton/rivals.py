"""Is there a better minimiser of the lower loss than the one found?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .counted_losses import CountedLosses, PureLoss
from .lower_level import Lowered, descend

STARTS = 8


class Rival(NamedTuple):
    """Another minimiser of g(u, .) and what it makes of the one found."""

    status: str
    """``lower_not_global``: g is lower here; ``lower_tie``: f is, and g the same; ``shallower``: f
    is, and g is higher."""
    v: Tensor


def rival(
    losses: CountedLosses,
    plain: tuple[PureLoss, PureLoss],
    stages: Sequence[PureLoss],
    u: Tensor,
    v: Tensor,
    scales: tuple[float, float],
) -> Rival | None:
    """The best of what descents on g(u, .) from random starts find against v.

    None is no proof: the starts are few, at most 100 evaluations each, and at distances of about
    1 + ||v|| and then three times that.

    Args:
        losses: counts; its losses are changed.
        plain: f and g.
        stages: what to descend on, one after the other: g, or g with barriers of falling weight.
        u: held fixed.
        v: the minimiser found.
        scales: of f and g; differences under 1e-6 (f) and 1e-8 (g) of them count as none, under
            1e-4 and 1e-5 with barriers.
    """
    generator, found = torch.Generator().manual_seed(0), dict[str, Rival]()
    unit = 1 + float(v.norm())
    barriers = len(stages) > 1
    near_f = (1e-4 if barriers else 1e-6) * scales[0]
    near_g = max(1e-5 if barriers else 1e-8, 100 * losses.eps) * scales[1]
    losses.use(*plain)
    f, g = losses.upper(u, v).value, losses.lower(u, v).value
    lowest, least = g - near_g, {"lower_tie": f - near_f, "shallower": f - near_f}
    for i in range(STARTS):
        away = torch.randn(v.numel(), dtype=torch.float64, generator=generator).to(v)
        start = v + (1 if i < STARTS / 2 else 3) * unit / math.sqrt(v.numel()) * away
        low = _descend(losses, plain[0], stages, u, start)
        if low is None:
            continue
        losses.use(*plain)
        other = losses.lower(u, low.v).value
        if other < lowest:
            lowest, found["lower_not_global"] = other, Rival("lower_not_global", low.v)
        elif low.converged and float((low.v - v).norm()) > 0.05 * unit:
            status = "lower_tie" if other < g + near_g else "shallower"
            value = losses.upper(u, low.v).value
            if value < least[status]:
                least[status], found[status] = value, Rival(status, low.v)
    losses.use(*plain)
    for status in ("lower_not_global", "lower_tie", "shallower"):
        if status in found:
            return found[status]
    return None


def _descend(
    losses: CountedLosses, f: PureLoss, stages: Sequence[PureLoss], u: Tensor, v: Tensor
) -> Lowered | None:
    low = None
    for stage in stages:
        losses.use(f, stage)
        if not math.isfinite(losses.lower(u, v).value):
            return None
        low = descend(losses, u, v, tolerance=1e-5, budget=100)
        v = low.v
    return low
