r"""The lower level by itself: v with r = grad_v g(u, v) = 0 and H = d2g/dv2 >= 0."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .counted_losses import CountedLosses, LowerModel, require_finite
from .lower_hessian import Hessian, Krylov, hessian_of
from .trust_region import FLAT, Step, steihaug

SADDLE = -1e-9  # lowest eigenvalue over the largest: under this, v is no minimiser
RUNAWAY = 1e15  # ||u|| or ||v|| beyond this: the loss has no minimum


class Lowered(NamedTuple):
    """A point at which the lower level is solved, or where that ended."""

    v: Tensor
    model: LowerModel
    converged: bool
    slow: int
    """Last Newton steps in a row that shrank slowly; many betray a flat lower level."""


def is_minimiser(H: Hessian, eps: float) -> bool:
    """No negative curvature beyond rounding."""
    return H.lowest >= min(SADDLE, -100 * eps)


def descend(
    losses: CountedLosses,
    u: Tensor,
    v: Tensor,
    H: Hessian | None = None,
    *,
    tolerance: float,
    budget: float = math.inf,
) -> Lowered:
    """Minimise g(u, .) from v by trust-region Newton-CG.

    Converged when the Newton step, and what a sequence shrinking at the rate seen leaves to do, is
    under ``tolerance * (1 + ||v||)``: a criterion in v, blind to the scale of g.

    Args:
        losses: where g comes from.
        u: held fixed.
        v: the start.
        H: decomposed at a point nearby; preconditions.
        tolerance: on v, relative.
        budget: evaluations for a trial that may be refused.
    """
    last = losses.count + budget
    model, radius = losses.lower(u, v), 1 + float(v.norm())
    if not _finite(model):
        return Lowered(v, model, False, 0)
    slow, previous, largest = 0, math.inf, 0.0 if H is None else H.curvature
    refused = math.inf  # length of the first of the refused steps in a row
    while losses.count < last:
        step = _newton(model, v, H, radius, largest)
        size, unit, largest = float(step.value.norm()), 1 + float(v.norm()), step.curvature
        if unit > RUNAWAY:
            break
        if step.decrease <= 0:  # r is zero, or lies where g is flat
            return Lowered(v, model, True, slow)
        trial = losses.lower(u, v + step.value)
        ratio = (model.value - trial.value) / step.decrease
        if step.decrease <= 100 * losses.eps * abs(model.value):  # g cannot tell: trust r
            if not float(trial.residual.norm()) <= 0.5 * float(model.residual.norm()):
                return Lowered(v, model, size <= 1e-6 * unit, slow)
            ratio = 1.0
        if not (_finite(trial) and ratio > 1e-4):
            refused = size if refused == math.inf else refused
            radius = 0.25 * size
            if radius <= 4 * losses.eps * unit:
                return Lowered(v, model, refused <= 1e-6 * unit, slow)
            continue
        v, model, refused = v + step.value, trial, math.inf
        if step.interior:
            rate = min(1.0, size / previous) if previous < math.inf else 1.0
            slow, previous = slow + 1 if 0.3 < rate < 1 else 0, size
            if size * max(rate, 1e-3) <= max(1 - rate, 1e-3) * tolerance * unit:
                return Lowered(v, model, True, slow)
        elif ratio > 0.75:
            radius *= 2
    return Lowered(v, model, False, slow)


def _newton(model: LowerModel, v: Tensor, H: Hessian | None, radius: float, largest: float) -> Step:
    limit = 2 * v.numel() + 10
    if H is None:
        return steihaug(
            model.hessian, model.residual, radius, tolerance=1e-3, limit=limit, largest=largest
        )
    return steihaug(
        model.hessian,
        model.residual,
        radius,
        tolerance=1e-3,
        limit=limit,
        largest=largest,
        precondition=H.precondition,
        flat=max(FLAT, H.flat),
    )


def _finite(model: LowerModel) -> bool:
    return math.isfinite(model.value) and bool(torch.isfinite(model.residual).all())


def solve_lower(losses: CountedLosses, u: Tensor, v: Tensor, tolerance: float) -> Lowered:
    """A minimiser of g(u, .) near v, never a saddle or a maximiser: those are escaped from."""
    low = descend(losses, u, v, tolerance=1e-3)
    require_finite("the lower loss at the start", v.new_tensor(low.model.value))
    require_finite("the lower residual grad_v g at the start", low.model.residual)
    for _ in range(20):
        if float(low.v.norm()) > RUNAWAY:
            return low
        H = hessian_of(low.model, u, torch.ones_like(v), losses.eps)
        if not is_minimiser(H, losses.eps):
            away = (1 + float(low.v.norm())) * 0.1 * H.escape
            up, down = low.v + away, low.v - away
            downhill = losses.lower(u, up).value <= losses.lower(u, down).value
            low = descend(losses, u, up if downhill else down, tolerance=1e-3)
            continue
        low = descend(losses, u, low.v, H, tolerance=tolerance)
        if low.converged or isinstance(H, Krylov):
            return low
    return low
