"""Constrained problems with closed forms: a box on the upper level, a half-space on the lower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .draws import generator, normal, normal_start, uniform_start, vector
from .protocol import Problem


def box() -> Problem:
    r"""An upper solution on the bound.

    .. math:: g = \tfrac12 (v - u)^2, \qquad f = \tfrac12 (v - 2)^2, \qquad -1 \le u \le 1

    v* = u, so u* = v* = 1 and f* = 1/2; the hypergradient there is -1, its projection 0.
    """
    return Problem(
        name="box",
        title="box on the upper level",
        source="textbook",
        traps="The hypergradient does not vanish at the solution; only its projection does.",
        tags=frozenset({"nonsingular", "constrained"}),
        upper_loss=lambda u, v: (v - 2).square().sum() / 2,
        lower_loss=lambda u, v: (v - u).square().sum() / 2,
        start=uniform_start((-1, 1), (-2, 2)),
        best_lower=lambda u: u.clone(),
        exact_hypergradient=lambda u: u - 2,
        optimal_value=0.5,
        solutions=((vector(1), vector(1)),),
        upper_box=(-1.0, 1.0),
    )


def half_space(dimension: int = 4, bound: float = 0.5, seed: int = 0) -> Problem:
    r"""The lower level projects u on a half-space.

    .. math:: g = \tfrac12 \lVert v - u\rVert^2 \text{ where } a'v \le b, \qquad
        f = \tfrac12 \lVert v - t\rVert^2, \qquad \lVert a\rVert = 1

    v* = u - max(0, a'u - b) a and the hypergradient is (I - aa')(v* - t) where the bound is active,
    v* - t elsewhere. The target violates it, a't = b + 1: so v* = t - a, f* = 1/2, and every
    u = v* + s a with s >= 0 is optimal.
    """
    source = generator(seed)
    a = normal(source, dimension)
    a = a / torch.linalg.vector_norm(a)
    target = normal(source, dimension)
    target = target + (bound + 1 - a @ target) * a
    nearest = target - a

    def best_lower(u: Tensor) -> Tensor:
        return u - (a @ u - bound).clamp(min=0) * a

    def hypergradient(u: Tensor) -> Tensor:
        gap = best_lower(u) - target
        return torch.where(a @ u > bound, gap - (a @ gap) * a, gap)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        along = (a @ (u - nearest)).clamp(min=0)
        return ((u - nearest - along * a).square().sum() + (v - nearest).square().sum()).sqrt()

    return Problem(
        name="half_space",
        title="projection on a half-space",
        source="textbook",
        traps="Where the bound is active u does not reach v along a; at its edge v*(u) has a kink.",
        tags=frozenset({"nonsingular", "constrained", "many_solutions"}),
        upper_loss=lambda u, v: (v - target).square().sum() / 2,
        lower_loss=lambda u, v: (v - u).square().sum() / 2,
        start=normal_start(dimension, dimension, spread=2.0),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.5,
        solutions=((nearest, nearest),),
        distance=distance,
        h_lower=lambda u, v: (a @ v - bound)[None],
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {"box": box, "half_space": half_space}
