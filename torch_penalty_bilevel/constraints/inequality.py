"""Inequalities of both levels, by multipliers; those of the lower level are solved for with v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..arguments import Number
from ..tensors import Tensors


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

    weight = Number("be a finite number > 0", "without it h is ignored")
    rate = Number("lie in (0, 1]", "at 0 the multiplier would never move")

    def __init__(
        self, closure: Callable[..., Tensor], weight: float = 1.0, rate: float = 0.1
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure must be callable and return h, got {closure!r}")
        self.closure = closure
        self.weight = weight
        self.rate = rate


class LowerPoint(NamedTuple):
    """A point (v, z) of the lower level, or a vector like it."""

    parameters: Tensors
    """v."""
    multipliers: Tensors
    """z of each lower inequality; empty where there is none."""

    @classmethod
    def of(cls, row: Sequence[Tensor], multipliers: int) -> LowerPoint:
        """Cut ``row``, in which the multipliers come last."""
        end = len(row) - multipliers
        return cls(tuple(row[:end]), tuple(row[end:]))

    @property
    def row(self) -> Tensors:
        """All in one, as engines and rules take it."""
        return self.parameters + self.multipliers
