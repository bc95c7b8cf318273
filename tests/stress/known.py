"""More small problems with known answers: what ``phases.py`` has, and what it has not.

Letters: u upper, v lower, f upper loss, g lower loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from phases import Known, Run, followed, indefinite, sloped
from torch import Tensor
from torch.autograd.functional import hessian


def _known(f, g, u: Tensor, v: Tensor, to_u: Tensor, to_v: Tensor, phi) -> Known:
    def error(u: Tensor, v: Tensor) -> float:
        return float((u - to_u).norm() + (v - to_v).norm())

    return Known(f, g, u, v, error, phi)


def loose(dtype: torch.dtype = torch.float64) -> Known:
    """g = (a'v - u)^2 / 2 leaves v free along a plane, f = (|v - b|^2 + u^2) / 2 picks a point:
    v* = (I + a a')^-1 b, u* = a'v*; there grad_v f = -a u*, along a as H is."""
    a, b = torch.tensor([0.6, 0.8, 0.0]).to(dtype), torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    v = b - a * (a @ b) / (1 + a @ a)
    return _known(
        lambda u, v: ((v - b).square().sum() + u.square().sum()) / 2,
        lambda u, v: (a @ v - u).square().sum() / 2,
        torch.tensor([3.0]).to(dtype),
        torch.zeros(3, dtype=dtype),
        (a @ v).reshape(1),
        v,
        lambda u, v: v - a * (a @ v - u),
    )


def stiff(dtype: torch.dtype = torch.float64) -> Known:
    """``sloped`` with H = diag(1, .1, .01): u* = v* = b / 2 again, reached at three speeds."""
    h, b = torch.tensor([1.0, 0.1, 0.01]).to(dtype), torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    return _known(
        lambda u, v: ((v - b).square().sum() + u.square().sum()) / 2,
        lambda u, v: (h * (v - u).square()).sum() / 2,
        torch.full((3,), 3.0, dtype=dtype),
        torch.zeros(3, dtype=dtype),
        b / 2,
        b / 2,
        lambda u, v: v - h * (v - u),
    )


def weighted(dtype: torch.dtype = torch.float64) -> Known:
    """Pairs of samples 0 and 1, one weight u each: g = sum sigmoid(u) v^2 + sigmoid(-u) (1 - v)^2,
    so v* = sigmoid(-u), and f = |v - b|^2 wants it at b."""
    b = torch.tensor([0.3, 0.5, 0.8]).to(dtype)
    return _known(
        lambda u, v: (v - b).square().sum(),
        lambda u, v: (u.sigmoid() * v.square() + (-u).sigmoid() * (1 - v).square()).sum(),
        torch.zeros(3, dtype=dtype),
        torch.zeros(3, dtype=dtype),
        -b.logit(),
        b,
        lambda u, v: (v + (-u).sigmoid()) / 2,
    )


def edged(dtype: torch.dtype = torch.float64) -> Known:
    """g = |v - u|^2 / 2 over v >= 0, so v* = max(u, 0); f = (|v - b|^2 + |u - c|^2) / 2 with
    b = (1, -2), c = (0, -1): u* = (.5, -1), v* = (.5, 0), where the bound holds v."""
    b, c = torch.tensor([1.0, -2.0]).to(dtype), torch.tensor([0.0, -1.0]).to(dtype)
    return _known(
        lambda u, v: ((v - b).square().sum() + (u - c).square().sum()) / 2,
        lambda u, v: (v - u).square().sum() / 2,
        torch.full((2,), 1.0, dtype=dtype),
        torch.full((2,), 2.0, dtype=dtype),
        torch.tensor([0.5, -1.0]).to(dtype),
        torch.tensor([0.5, 0.0]).to(dtype),
        lambda u, v: u.clamp(min=0),
    )


PROBLEMS: dict[str, Callable[..., Known]] = {
    made.__name__: made for made in (followed, sloped, indefinite, loose, stiff, weighted)
}

# Of the upper and the lower level, for SGD. The lower one stays below 2 / (1.3 ||H||).
RATES = dict.fromkeys(PROBLEMS, (0.05, 0.3)) | {"stiff": (0.1, 1.0), "weighted": (0.5, 0.3)}


def penalised(known: Known, weight: float) -> tuple[Tensor, Tensor]:
    """The least (u, v) of f + weight * g, both quadratic and min g(u, .) = 0: where
    ``penalty="value"`` ends as long as this is its weight."""
    n = known.u.numel()

    def total(x: Tensor) -> Tensor:
        return known.f(x[:n], x[n:]) + weight * known.g(x[:n], x[n:])

    origin = torch.zeros(n + known.v.numel(), dtype=known.u.dtype)
    least = -torch.linalg.solve(hessian(total, origin), torch.func.grad(total)(origin))
    return least[:n], least[n:]


def bias(problem: str, run: Run) -> float:
    """How far the answer for the weight that the value gap has in ``run`` is from the answer."""
    if run.optimizer.penalty.name != "value" or problem not in ("sloped", "loose", "stiff"):
        return 0.0
    known = PROBLEMS[problem]()
    return known.error(*penalised(known, float(run.optimizer.metrics.penalty_weight)))
