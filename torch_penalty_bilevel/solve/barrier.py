r"""Constraints of ``minimize``: a relaxed logarithmic barrier on each level, followed to zero.

.. math::
    \ell_\tau = \ell + \tau \sum_i \beta(-h_i), \qquad
    \beta(z) = -\log z \;\text{ for } z > \delta, \quad
    \tfrac12\bigl((z/\delta - 2)^2 - 1\bigr) - \log\delta \;\text{ below}, \quad \delta = \tau / 100

for l = f or g, h <= 0 elementwise, tau = 1, 0.1, ..., tolerance. The parabola lets iterates start
and stray outside. At tau the multipliers are tau / z, so an active bound is missed by
z = tau / multiplier and a bound with a zero multiplier by about sqrt(tau).

A simplex is parametrised by x = 1/n + N z with N an orthonormal basis of the vectors that sum to
zero, so that its equation always holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .losses import Losses, PureLoss

Values: TypeAlias = Callable[[Any, Any], Tensor]
Path: TypeAlias = list[tuple[Tensor, Tensor]]


class Restriction:
    """The constraints of one level, as values h <= 0 and a change of variables.

    Args:
        name: of the argument, for errors.
        constraints: None, one constraint or several.
        index: 0 for the upper level, 1 for the lower.
    """

    def __init__(self, name: str, constraints: Any, index: int) -> None:
        several = isinstance(constraints, Sequence)
        found: Any = constraints if several else [] if constraints is None else [constraints]
        self._simplex = any(type(c).__name__ == "Simplex" for c in found)
        self._parts = [_values(name, c, index) for c in found]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def values(self, u: Any, v: Any) -> Tensor:
        """h, one vector."""
        return torch.cat([part(u, v) for part in self._parts])

    def inside(self, tree: Any) -> Any:
        """From the free variables to the user's."""
        return pytree.tree_map(_on_simplex, tree) if self._simplex else tree

    def free(self, tree: Any) -> Any:
        """From the user's variables to the free ones."""
        return pytree.tree_map(_off_simplex, tree) if self._simplex else tree

    def direction(self, tree: Any) -> Any:
        """A vector of the free space in the user's."""
        return pytree.tree_map(lambda z: z @ _basis(z, 1).T, tree) if self._simplex else tree


def _values(name: str, constraint: Any, index: int) -> Values:
    """H(u, v) of a constraint object, by the attributes of its class."""
    if hasattr(constraint, "closure"):
        return lambda u, v: constraint.closure(u, v).reshape(-1)
    if hasattr(constraint, "low") and hasattr(constraint, "high"):
        each: Callable[[Tensor], Tensor] = lambda x: _box(x, constraint.low, constraint.high)  # noqa: E731
    elif hasattr(constraint, "radius"):
        each = lambda x: _ball(x, constraint.radius, getattr(constraint, "rows", False))  # noqa: E731
    elif type(constraint).__name__ == "Simplex":
        each = lambda x: -x.reshape(-1)  # noqa: E731
    else:
        raise TypeError(
            f"{name} must be Box, NonNegative, Simplex, Ball or Inequality, or a list of them, got "
            f"{constraint!r}"
        )
    return lambda *levels: torch.cat([each(x) for x in pytree.tree_leaves(levels[index])])


def _box(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.to(x).expand_as(x), high.to(x).expand_as(x)
    return torch.cat([(low - x)[low.isfinite()], (x - high)[high.isfinite()]])


def _ball(x: Tensor, radius: float, rows: bool) -> Tensor:
    squares = x.square().flatten(1).sum(1) if rows else x.square().sum().reshape(1)
    return (squares - radius**2) / (2 * radius)


def _basis(like: Tensor, added: int = 0) -> Tensor:
    """N: n x (n - 1), orthonormal, columns sum to zero; n is the last dimension plus ``added``."""
    n = like.shape[-1] + added
    rows = torch.eye(n, dtype=torch.float64) - 1 / n
    return torch.linalg.qr(rows[:, : n - 1]).Q.to(like)


def _on_simplex(z: Tensor) -> Tensor:
    return z @ _basis(z, 1).T + 1 / (z.shape[-1] + 1)


def _off_simplex(x: Tensor) -> Tensor:
    if x.dim() == 0 or x.shape[-1] < 2:
        raise ValueError(f"Simplex needs at least two entries per row, got shape {tuple(x.shape)}")
    return (x - 1 / x.shape[-1]) @ _basis(x)


def substituted(function: Any, upper: Restriction, lower: Restriction) -> Any:
    """A function of the user's variables as one of the free variables."""
    return lambda u, v: function(upper.inside(u), lower.inside(v))


def barrier(loss: PureLoss, restriction: Restriction, tau: float) -> PureLoss:
    """l_tau, on the user's variables."""
    if not restriction:
        return loss
    delta = 1e-2 * tau

    def barred(u: Any, v: Any) -> Tensor:
        z = -restriction.values(u, v)
        far = -torch.log(z.clamp_min(delta))
        near = ((z / delta - 2).square() - 1) / 2 - math.log(delta)
        return loss(u, v) + tau * torch.where(z > delta, far, near).sum()

    return barred


def judged(
    losses: Losses, u: Tensor, v: Tensor, values: Sequence[Values], tau: float
) -> str | None:
    """What the barrier did not resolve: a constraint violated, or neither active nor inactive.

    The latter: both z and the multiplier tau / z are small, but far from tau.
    """
    trees = losses.upper_level.tree(u), losses.lower_level.tree(v)
    z = torch.cat([u.new_zeros(0), *(-h(*trees).detach().to(u) for h in values)])
    if bool((z < -1e2 * tau).any()):
        return "infeasible"
    return "weakly_active" if bool((torch.minimum(z, tau / z) > 1e2 * tau).any()) else None


def along_the_path(losses: Losses, path: Path, values: Sequence[Values]) -> tuple[Tensor, Tensor]:
    """The start at tau / 10 from the solutions at 10 tau and tau: x + (x - x_before) / 10.

    The central path is smooth in tau, so this leaves an error of order tau^2, against tau without
    it; it is used where it keeps every h < 0 (Fiacco & McCormick, 1968).
    """
    if len(path) < 2:
        return path[-1]
    (u_before, v_before), (u, v) = path[-2:]
    u, v = u + (u - u_before) / 10, v + (v - v_before) / 10
    trees = losses.upper_level.tree(u), losses.lower_level.tree(v)
    return (u, v) if all(bool((h(*trees) < 0).all()) for h in values) else path[-1]
