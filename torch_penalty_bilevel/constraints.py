r"""Sets that a level's parameters stay in, tensor by tensor, for ``PenaltyBilevelOptimizer``.

A step from x with gradient g goes to the set C in three moves:

1. the critical face at (x, g): entries at a bound that -g pushes outward are held, and the
   projector P onto the span of the face takes from g what no feasible motion can follow;
2. the level's rule takes a step with P g, so its moments see only feasible motion;
3. the result is projected onto the face (onto C, with the held entries held).

Projecting the result of a step with g itself, as is often done, has false fixed points when the
rule scales entries: on a simplex Adam's first step is the same for every entry, it is
normal to the simplex and nothing moves. Here -P g lies in the tangent cone T of C at x. For a
diagonal scaling D > 0, a fixed point means that -D P g lies in the normal cone, the polar of T, so
<D P g, P g> <= 0, hence P g = 0: only stationary points are fixed. Holding the entries of move 1
also in move 3 makes the step a descent direction to first order.

In the lower level the same face gives the hypergradient. With v held to its face, the adjoint
lives on the span of the face,

.. math:: r = P \nabla_v g, \qquad q = P q, \qquad a = P(\nabla_v f + H q + \mu q) = 0,
          \qquad \nabla F = \nabla_u f + J q

where mu = 0 for flat sets; for the sphere ||v|| = R it is the multiplier <-grad g, v> / R^2 of
(||v||^2 - R^2) / 2. Where an entry sits at its bound with a zero multiplier (no strict
complementarity) the solution map has a kink; such entries count as free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .faces import Face


class Projection(Protocol):
    """A closed convex set with a Euclidean projection."""

    def project(self, point: Tensor) -> Tensor:
        """The nearest point of the set; a point of the set comes back bit-equal."""
        ...

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """The critical face at ``point``."""
        ...


class Box:
    """low <= x <= high, entry by entry.

    Args:
        low: a number, or a tensor that broadcasts to every parameter of the level; may be -inf.
        high: likewise; may be inf.

    Example:
        >>> Box(0.0, 1.0).project(torch.tensor([-2.0, 0.5, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, low: float | Tensor, high: float | Tensor) -> None:
        self.low = torch.as_tensor(low).detach()
        self.high = torch.as_tensor(high).detach()
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
        low, high = self._bounds(point)
        held = ((point <= low) & (gradient > 0)) | ((point >= high) & (gradient < 0))

        def retract(before: Tensor, after: Tensor) -> Tensor:
            return self.project(torch.where(held, before, after))

        return Face(retract, moving=~held)


class NonNegative(Box):
    """x >= 0, entry by entry."""

    def __init__(self) -> None:
        super().__init__(0.0, math.inf)


class Simplex:
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


class Ball:
    r"""||x||_2 <= radius, for each tensor of the level as a whole.

    Args:
        radius: > 0.
        rows: bound each row (entry along the first dimension) instead of the whole tensor.

    Example:
        >>> Ball(5.0).project(torch.tensor([6.0, 8.0]))
        tensor([3., 4.])
    """

    def __init__(self, radius: float, rows: bool = False) -> None:
        if not _is_number(radius) or not 0 < radius < math.inf:
            raise ValueError(
                f"radius must be a finite number > 0, got {radius!r}; to fix x at 0 freeze it"
            )
        self.radius = float(radius)
        self.rows = rows

    def project(self, point: Tensor) -> Tensor:
        """Scaled down to the radius where longer."""
        wide = point.to(torch.promote_types(point.dtype, torch.float32))
        length = self._length(wide)
        outside = length > self.radius * (1 + self._tolerance(point))
        shrunk = wide * (self.radius / torch.where(outside, length, 1.0))
        return torch.where(outside, shrunk.to(point.dtype), point)

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """The tangent plane of the sphere where x is on it and -gradient points outward."""
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


class Inequality:
    r"""h(u, v) <= 0 entry by entry, for a tensor h of any shape.

    In the upper level, the augmented Lagrangian with its slack eliminated (Rockafellar 1973), so
    that the v-dependence of h goes through the adjoint like that of f:

    .. math::
        f_{aug} = f + \tfrac{1}{2\rho}\sum\bigl(\max(0, \mu + \rho h)^2 - \mu^2\bigr), \qquad
        \mu \leftarrow \mu + \kappa\,(\max(0, \mu + \rho h) - \mu)

    In the lower level, the same function of the extended lower vector (v, z):

    .. math::
        L(u, v, z) = g + \tfrac{1}{2\rho}\sum\bigl(\max(0, z + \rho h)^2 - z^2\bigr)

    Its gradient is the KKT residual: grad_v g + A' max(0, z + rho h) with A = dh/dv, and
    max(-z / rho, h), which is zero iff h <= 0, z >= 0 and z h = 0. Its Hessian is symmetric,
    so J q and H q of (v, z) are products of one scalar loss as before, and q is the adjoint of the
    KKT system. v descends and z ascends, by kappa rho times its residual; nu likewise, its z part
    by min(rho, 1 / L). With curvature c + rho alpha^2 of v and slope alpha of h the ascent is
    stable if kappa rho alpha^2 <= c + rho alpha^2, so for any rho; a rule with momentum 0.9 lags
    about nine steps, hence kappa = 0.1.

    ``metrics.lower_loss`` is then L, ``metrics.residual_norm`` that of the KKT residual. At a
    solution with z = h = 0 the solution map has a kink, and the certificate may not settle.

    Differs from squared slack variables: nothing to initialise, and no spurious stationary points
    where a slack is zero.

    Args:
        closure: returns h; takes nothing, or (upper, lower) with ``curvature="functional"``. It
            reads live tensors, so a deep copy of the optimizer needs a constraint of its own.
        weight: rho > 0, multiplies max(0, h)^2 / 2; in units of the level's loss per h^2.
        rate: kappa in (0, 1], the share of the multiplier's correction taken per step.
    """

    def __init__(
        self, closure: Callable[..., Tensor], weight: float = 1.0, rate: float = 0.1
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable and return h, got {closure!r}")
        if not _is_number(weight) or not 0 < weight < math.inf:
            raise ValueError(
                f"weight must be a finite number > 0, got {weight!r}; without it h is ignored"
            )
        if not _is_number(rate) or not 0 < rate <= 1:
            raise ValueError(
                f"rate must lie in (0, 1], got {rate!r}; at 0 the multiplier would never move"
            )
        self.closure = closure
        self.weight = float(weight)
        self.rate = float(rate)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _counting(like: Tensor) -> Tensor:
    """1, 2, ... along the last dimension."""
    return torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=like.dtype)
