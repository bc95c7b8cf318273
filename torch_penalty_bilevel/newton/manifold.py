r"""The upper loss along the manifold of lower solutions, to second order.

.. math::
    q = -H^+ \nabla_v f, \qquad T(p, z) = (p,\; N z - H^+ J' p), \qquad
    G = (\nabla_u f + J q,\; N' \nabla_v f), \qquad B = T' \, \nabla^2 L \, T

H^+ is the pseudo-inverse of H and N a basis of its kernel; p moves u, z moves v within argmin g,
which is the optimistic choice where the lower solution is not unique. G and B are gradient and
Hessian of f along the manifold r = 0 in the coordinates (p, z), L = f + <q, r>; B is exact because
points are restored to r = 0 along the range of H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear_solve import lanczos_lowest
from .counted_losses import CountedLosses, Product, UpperModel, require_finite
from .lower_hessian import Hessian, hessian_of
from .lower_level import Lowered, descend, is_minimiser
from .trust_region import Step, steihaug


@dataclass(frozen=True)
class Point:
    """A point of the manifold with what the reduced Newton step needs."""

    u: Tensor
    low: Lowered
    H: Hessian
    f: float
    q: Tensor
    grad_u: Tensor
    """f_u + J q: the hypergradient."""
    grad_v: Tensor
    """f_v + H q: the adjoint residual, in the kernel of H."""
    scale: float
    """||f_u|| + ||J q||: what the gradient is small against."""
    slope: float
    """||f_v||."""

    @property
    def gradient(self) -> Tensor:
        """G."""
        return torch.cat([self.grad_u, self.H.drop(self.grad_v)]) if self.H.nullity else self.grad_u


def linearise(
    losses: CountedLosses, u: Tensor, low: Lowered, upper: UpperModel | None = None
) -> Point:
    """The point (u, low.v); ``upper`` is f there, if known."""
    f, f_u, f_v = upper or losses.upper(u, low.v)
    require_finite("the upper loss", u.new_tensor(f))
    require_finite("the gradient of the upper loss", f_u, f_v)
    require_finite("the lower loss", u.new_tensor(low.model.value))
    H = hessian_of(low.model, u, f_v, losses.eps)
    q = -H.solve(f_v)
    Jq, Hq = low.model.joint(torch.zeros_like(u), q)
    scale = float(f_u.norm() + Jq.norm())
    return Point(u, low, H, f, q, f_u + Jq, f_v + Hq, scale, float(f_v.norm()))


class ReducedHessian:
    """B and T at a point."""

    def __init__(self, losses: CountedLosses, at: Point) -> None:
        self._at, self._n = at, at.u.numel()
        self._lagrangian = losses.lagrangian(at.u, at.low.v, at.q)

    def tangent(self, x: Tensor) -> Tensor:
        """The lower part of T(p, z)."""
        H, n = self._at.H, self._n
        y = -H.solve(H.cross_transposed(x[:n]))
        return y + H.lift(x[n:]) if H.nullity else y

    def product(self, x: Tensor) -> Tensor:
        """B x."""
        H = self._at.H
        w_u, w_v = self._lagrangian(x[: self._n], self.tangent(x))
        out = w_u - H.cross(H.solve(w_v))
        return torch.cat([out, H.drop(w_v)]) if H.nullity else out


@dataclass(frozen=True)
class Move:
    """A step along the manifold: its model, and where it leads to first order."""

    step: Step
    u: Tensor
    v: Tensor


def newton_step(losses: CountedLosses, at: Point, radius: float, tolerance: float) -> Move:
    """The trust-region Newton step along the manifold."""
    B, gradient = ReducedHessian(losses, at), at.gradient
    limit = 2 * gradient.numel() + 10
    step = steihaug(B.product, gradient, radius, tolerance=tolerance, limit=limit)
    return _move(at, B.tangent, step)


def escapes(losses: CountedLosses, at: Point) -> list[Move]:
    """Steps along the most negative curvature of f, longest first; none at a minimum."""
    B, gradient = ReducedHessian(losses, at), at.gradient
    ratio, x = lanczos_lowest(B.product, gradient, steps=10)
    if ratio > -1e-6:
        return []
    curvature, slope = float(x @ B.product(x)), float(x @ gradient)
    moves = list[Move]()
    for length in (0.1, 0.02, 0.004):
        for sign in (-1.0, 1.0) if slope > 0 else (1.0, -1.0):
            t = sign * length * (1 + float(at.u.norm()))
            decrease = -t * slope - t**2 * curvature / 2
            moves.append(_move(at, B.tangent, Step(t * x, decrease, False, abs(curvature))))
    return moves


def _move(at: Point, tangent: Product, step: Step) -> Move:
    n = at.u.numel()
    return Move(step, at.u + step.value[:n], at.low.v + tangent(step.value))


@dataclass(frozen=True)
class Trial:
    """What became of a move."""

    at: Point | None
    """The new point; None if the move was refused."""
    ratio: float
    """True over predicted decrease."""
    slow: int
    value: float


def attempt(losses: CountedLosses, at: Point, move: Move, tolerance: float) -> Trial:
    """Restore the move to r = 0 by Newton's method on g(u, .), and accept it if f falls.

    What is left of r enters the value by f + <q, r>, exact to second order. Where the decrease
    drowns in the rounding of f, the reduced gradient decides.
    """
    low = descend(losses, move.u, move.v, at.H, tolerance=tolerance, budget=max(500, at.q.numel()))
    upper, decrease = losses.upper(move.u, low.v), move.step.decrease
    value = upper.value + float(at.q @ low.model.residual)
    ratio = (at.f - value) / decrease if decrease > 0 else 0.0
    tiny = decrease <= 1e3 * losses.eps * abs(at.f)
    if not (low.converged and math.isfinite(value) and (ratio > 0.05 or tiny)):
        return Trial(None, ratio, low.slow, value)
    new = linearise(losses, move.u, low, upper)
    better = ratio > 0.05 or float(new.gradient.norm()) < float(at.gradient.norm())
    accepted = better and is_minimiser(new.H, losses.eps)
    return Trial(new if accepted else None, ratio, low.slow, value)
