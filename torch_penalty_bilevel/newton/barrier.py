r"""Constraints of ``minimize``: a relaxed logarithmic barrier on each level, followed to zero.

.. math::
    \ell_\tau = \ell + \tau S_\ell \sum_i \beta(-h_i), \qquad
    \beta(s) = -\log s \;\text{ for } s > \delta, \quad
    \tfrac12\bigl((s/\delta - 2)^2 - 1\bigr) - \log\delta \;\text{ below}, \quad \delta = \tau / 100

for l = f or g, h <= 0 elementwise, tau = 0.1, 0.01, ..., tolerance. The parabola lets iterates
start and stray outside. S is the loss's scale (``CountedLosses.scales``), so that c f has the path
of f. At tau the multipliers over S are tau / s, so an active bound is missed by s = tau /
multiplier and a bound with a zero multiplier by about sqrt(tau); ``active_set`` makes up for that.

A set in a plane (``Simplex``) offers coordinates in which its equation always holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..constraints import Inequality, Projection
from .counted_losses import PureLoss, Values


class ConstraintValues:
    """The constraints of one level, as values h <= 0 and a change of variables.

    Args:
        name: of the argument, for errors.
        constraints: None, one constraint or several.
        index: 0 for the upper level, 1 for the lower.
    """

    def __init__(self, name: str, constraints: Any, index: int) -> None:
        found = as_list(constraints)
        self._parts = [_values(name, c, index) for c in found]
        self._sets: list[Projection] = [c for c in found if not isinstance(c, Inequality)]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def values(self, u: Any, v: Any) -> Tensor:
        """h, one vector."""
        return torch.cat([part(u, v) for part in self._parts])

    def inside(self, tree: Any) -> Any:
        """From the free variables to the user's."""
        for each in self._sets:
            tree = pytree.tree_map(each.inside, tree)
        return tree

    def free(self, tree: Any) -> Any:
        """From the user's variables to the free ones."""
        for each in self._sets[::-1]:
            tree = pytree.tree_map(each.free, tree)
        return tree

    def direction(self, tree: Any) -> Any:
        """A vector of the free space in the user's."""
        for each in self._sets:
            tree = pytree.tree_map(each.direction, tree)
        return tree


def as_list(constraints: Any) -> list[Any]:
    """None, one constraint or several, as a list."""
    if constraints is None:
        return []
    return list(constraints) if isinstance(constraints, Sequence) else [constraints]


def _values(name: str, constraint: Any, index: int) -> Values:
    """H(u, v) of a constraint."""
    if isinstance(constraint, Inequality):
        return lambda u, v: constraint.closure(u, v).reshape(-1)
    needed = ("values", "inside", "free", "direction")
    if isinstance(constraint, type) or any(not hasattr(constraint, m) for m in needed):
        raise TypeError(
            f"{name} must be Box, NonNegative, Simplex, Ball or Inequality, or a list of them, got "
            f"{constraint!r}; a set of your own subclasses constraints.Projection and offers "
            "values(x) <= 0"
        )
    return lambda *levels: torch.cat(
        [constraint.values(x) for x in pytree.tree_leaves(levels[index])]
    )


def substituted(function: Any, upper: ConstraintValues, lower: ConstraintValues) -> Any:
    """A function of the user's variables as one of the free variables."""
    return lambda u, v: function(upper.inside(u), lower.inside(v))


def barrier(
    loss: PureLoss, restriction: ConstraintValues, tau: float, scale: float = 1.0
) -> PureLoss:
    """l_tau, on the user's variables."""
    if not restriction:
        return loss
    delta = 1e-2 * tau

    def barred(u: Any, v: Any) -> Tensor:
        z = -restriction.values(u, v)
        far = -torch.log(z.clamp_min(delta))
        near = ((z / delta - 2).square() - 1) / 2 - math.log(delta)
        return loss(u, v) + scale * tau * torch.where(z > delta, far, near).sum()

    return barred


def estimates(slack: Tensor, tau: float) -> Tensor:
    """The multipliers over S that the barrier stands for: -tau beta'(slack)."""
    delta = 1e-2 * tau
    return torch.where(slack > delta, tau / slack, 1e2 * (2 - slack / delta))


class Milestone(NamedTuple):
    """Where the path stood at a weight."""

    u: Tensor
    v: Tensor
    slack: Tensor
    """-(h_U, h_L)."""


def judged(slack: Tensor, tau: float) -> str | None:
    """What the barrier did not resolve: a constraint violated, or neither active nor inactive.

    The latter: both the slack s and the multiplier tau / s are small, but far from tau.
    """
    if bool((slack < -1e2 * tau).any()):
        return "infeasible"
    return "weakly_active" if bool((torch.minimum(slack, tau / slack) > 1e2 * tau).any()) else None


def ahead(before: Milestone, now: Milestone) -> tuple[Tensor, Tensor]:
    """The start at tau / 10 from the solutions at 10 tau and tau: x + (x - x_before) / 10.

    The central path is smooth in tau, so this leaves an error of order tau^2, against tau without
    it; it is used where it keeps every h < 0 (Fiacco & McCormick, 1968).
    """
    return now.u + (now.u - before.u) / 10, now.v + (now.v - before.v) / 10
