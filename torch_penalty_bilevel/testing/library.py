"""Small problems from published collections with a strongly convex, constrained lower level.

Every optimal value was checked by brute force: a grid over u, for each u a fine grid over v with a
refinement around its best points, independent of the closed forms here. Bounds that the
collections add only to have a finite box, and that are never active, are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .draws import uniform_start, vector
from .protocol import Loss, Map, Problem


def _through(upper_loss: Loss, best_lower: Map) -> Map:
    """The derivative of f(u, v*(u)) through a v* written with min and max: exact between kinks."""
    return torch.func.grad(lambda u: upper_loss(u, best_lower(u)))


def cw_1990_02() -> Problem:
    r"""Three lines around the lower solution.

    .. math:: g = (v - 5)^2, \quad v \le 2u + 1,\; u - 2v \le -2,\; u + 2v \le 14, \qquad
        f = (u - 3)^2 + (v - 2)^2, \quad 0 \le u \le 6

    v* = min(5, 2u + 1, 7 - u/2), never below 1 + u/2; u* = 1, v* = 3, f* = 5. Beyond u = 6 the
    lower level is infeasible. Local minima: u = 3 (f = 9) and u = 4.4 (f = 9.8).
    """

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return ((u - 3).square() + (v - 2).square()).sum()

    def best_lower(u: Tensor) -> Tensor:
        return torch.minimum(2 * u + 1, 7 - u / 2).clamp(max=5)

    return Problem(
        name="cw_1990_02",
        title="three lines around the lower solution",
        source="Clark & Westerberg (1990), section 3.2; BASBLib cw_1990_02",
        traps="Worse local minima at u = 3 and 4.4, separated by kinks at u = 2 and 4.",
        tags=frozenset({"nonsingular", "constrained", "library"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: (v - 5).square().sum(),
        start=uniform_start((0, 6), (0, 8)),
        best_lower=best_lower,
        exact_hypergradient=_through(upper_loss, best_lower),
        optimal_value=5.0,
        solutions=((vector(1), vector(3)),),
        upper_box=(0.0, 6.0),
        h_lower=lambda u, v: torch.cat([v - 2 * u - 1, u - 2 * v + 2, u + 2 * v - 14]),
    )


def d_1992_01() -> Problem:
    r"""A solution where the hypergradient has a double root.

    .. math:: g = (v - 3)^2, \quad v^2 \le u, \qquad f = (u - 3.5)^2 + (v + 4)^2, \quad
        1 \le u \le 10

    v* = min(3, sqrt(u)); u* = v* = 1, f* = 31.25. With the bound u >= 1 of BASBLib: f(u, v*(u))
    rises everywhere and is stationary, but not minimal, at u = 1; without it f falls to 28.25 at
    u = 0, where the lower level has no interior point.
    """

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return ((u - 3.5).square() + (v + 4).square()).sum()

    def best_lower(u: Tensor) -> Tensor:
        return u.sqrt().clamp(max=3)

    return Problem(
        name="d_1992_01",
        title="double root of the hypergradient",
        source="Dempe (1992); BASBLib d_1992_01, BOLIB Dempe1992b",
        traps="At u = 1 first and second derivative of f(u, v*(u)) vanish: slow, and no minimum.",
        tags=frozenset({"nonsingular", "constrained", "library"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: (v - 3).square().sum(),
        start=uniform_start((1, 10), (1, 10)),
        best_lower=best_lower,
        exact_hypergradient=_through(upper_loss, best_lower),
        optimal_value=31.25,
        solutions=((vector(1), vector(1)),),
        upper_box=(1.0, 10.0),
        h_lower=lambda u, v: v.square() - u,
    )


def d_1978_01() -> Problem:
    r"""A solution on a kink: the lower bound holds, but with the multiplier zero.

    .. math:: g = \lVert v - u\rVert^2, \quad \tfrac12 \le v \le \tfrac32, \qquad
        f = \lVert u\rVert^2 - 2 (u_1 + u_2) + \lVert v\rVert^2, \quad 0 \le u \le 10

    v* = clip(u), so u* = v* = (1/2, 1/2) and f* = -1.
    """

    def best_lower(u: Tensor) -> Tensor:
        return u.clamp(0.5, 1.5)

    def hypergradient(u: Tensor) -> Tensor:
        inside = (u > 0.5) & (u < 1.5)
        return 2 * u - 2 + 2 * best_lower(u) * inside

    return Problem(
        name="d_1978_01",
        title="solution on a kink",
        source="De Silva (1978); BASBLib d_1978_01",
        traps="At u* strict complementarity fails: f(u, v*(u)) has slope -1 below, 0 above.",
        tags=frozenset({"nonsingular", "constrained", "library"}),
        upper_loss=lambda u, v: (u.square() - 2 * u + v.square()).sum(),
        lower_loss=lambda u, v: (v - u).square().sum(),
        start=uniform_start((0, 10), (0.5, 1.5), 2, 2),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=-1.0,
        solutions=((vector(0.5, 0.5), vector(0.5, 0.5)),),
        upper_box=(0.0, 10.0),
        lower_box=(0.5, 1.5),
    )


def b_1988_01() -> Problem:
    r"""Local minima at both ends of the upper level.

    .. math:: g = (v - 1)^2 - 1.5 uv, \quad v \le 3u - 3,\; v \ge 2u - 8,\; v \le 7 - u,\; v \ge 0,
        \qquad f = (u - 5)^2 + (2v + 1)^2, \quad 1 \le u \le 5

    v* = 1 + 0.75 u within the bounds; u* = 1, v* = 0, f* = 17. The other end, u = 5 and v = 2, is a
    local minimum with f = 25. Outside 1 <= u <= 5 the lower level is infeasible.
    """

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return ((u - 5).square() + (2 * v + 1).square()).sum()

    def best_lower(u: Tensor) -> Tensor:
        highest = torch.minimum(3 * u - 3, 7 - u)
        return torch.minimum(1 + 0.75 * u, highest).maximum((2 * u - 8).clamp(min=0))

    return Problem(
        name="b_1988_01",
        title="local minima at both ends",
        source="Bard (1988), example 1; BASBLib b_1988_01",
        traps="From u > 3.43 descent ends in the worse one; at both ends V(u) is a point.",
        tags=frozenset({"nonsingular", "constrained", "library"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: ((v - 1).square() - 1.5 * u * v).sum(),
        start=uniform_start((1, 5), (0, 6)),
        best_lower=best_lower,
        exact_hypergradient=_through(upper_loss, best_lower),
        optimal_value=17.0,
        solutions=((vector(1), vector(0)),),
        upper_box=(1.0, 5.0),
        h_lower=lambda u, v: torch.cat([v - 3 * u + 3, 2 * u - v - 8, u + v - 7, -v]),
    )


def sa_1981_01() -> Problem:
    r"""An upper inequality that involves the lower variable.

    .. math:: g = (u + 2v - 30)^2, \quad u + v \le 20,\; 0 \le v \le 20, \qquad
        f = u^2 + (v - 10)^2, \quad v \le u,\; 0 \le u \le 15

    v* = min(15 - u/2, 20 - u), so v* <= u asks for u >= 10; u* = v* = 10, f* = 100.
    """

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return (u.square() + (v - 10).square()).sum()

    def best_lower(u: Tensor) -> Tensor:
        return torch.minimum(15 - u / 2, 20 - u)

    return Problem(
        name="sa_1981_01",
        title="upper inequality in both variables",
        source="Shimizu & Aiyoshi (1981), example 1; BASBLib sa_1981_01",
        traps="u* is at a kink of v*, where the upper inequality is active as well.",
        tags=frozenset({"nonsingular", "constrained", "library"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: (u + 2 * v - 30).square().sum(),
        start=uniform_start((0, 15), (0, 20)),
        best_lower=best_lower,
        exact_hypergradient=_through(upper_loss, best_lower),
        optimal_value=100.0,
        solutions=((vector(10), vector(10)),),
        upper_box=(0.0, 15.0),
        lower_box=(0.0, 20.0),
        h_upper=lambda u, v: v - u,
        h_lower=lambda u, v: u + v - 20,
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "cw_1990_02": cw_1990_02,
    "d_1992_01": d_1992_01,
    "d_1978_01": d_1978_01,
    "b_1988_01": b_1988_01,
    "sa_1981_01": sa_1981_01,
}
