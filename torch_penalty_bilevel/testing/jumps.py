"""Small problems from published collections whose lower solution jumps or branches.

Optimal values were checked as in ``library``: by brute force over both levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .draws import uniform_start, vector
from .protocol import Problem

_TIED = frozenset({"nonsingular", "nonunique", "nonconvex", "constrained", "library"})


def mb_2007_14() -> Problem:
    r"""The solution sits on a jump.

    .. math:: g = \tfrac13 v^3 - uv, \quad f = (u - \tfrac14)^2 + v^2, \quad -1 \le u, v \le 1

    v* = sqrt(u) for u >= 1/4 and -1 below; at 1/4 both are minimal and the optimistic v* = 1/2
    gives u* = 1/4, f* = 1/4. Just below, f is 1.
    """

    def best_lower(u: Tensor) -> Tensor:
        return torch.where(u >= 0.25, u.clamp(min=0.25).sqrt(), -1.0)

    return Problem(
        name="mb_2007_14",
        title="solution on a jump",
        source="Mitsos & Barton (2006), example 3.14; BASBLib mb_2007_14",
        traps="Descent from u > 1/4 runs over the edge; v = sqrt(u) stays a local minimum there.",
        tags=_TIED | {"discontinuous"},
        upper_loss=lambda u, v: ((u - 0.25).square() + v.square()).sum(),
        lower_loss=lambda u, v: (v.pow(3) / 3 - u * v).sum(),
        start=uniform_start((-1, 1), (-1, 1)),
        best_lower=best_lower,
        exact_hypergradient=lambda u: 2 * (u - 0.25) + (u > 0.25),
        optimal_value=0.25,
        solutions=((vector(0.25), vector(0.5)),),
        upper_box=(-1.0, 1.0),
        lower_box=(-1.0, 1.0),
    )


def mb_2007_16() -> Problem:
    r"""Two solutions in two branches.

    .. math:: g = -\tfrac12 uv^2 - \tfrac14 v^4, \quad f = 2u + v, \quad -1 \le u, v \le 1

    v* = 0 for u < -1/2 and one of -1, 1 above (at -1/2 all three); the optimistic one is -1. So
    (-1, 0) and (-1/2, -1) are both optimal, f* = -2.
    """
    return Problem(
        name="mb_2007_16",
        title="two solutions in two branches",
        source="Mitsos & Barton (2006), example 3.16; BASBLib mb_2007_16",
        traps="For u < 0, v = -sqrt(-u) is stationary, but a maximum of g between the minima.",
        tags=_TIED | {"discontinuous", "many_solutions"},
        upper_loss=lambda u, v: (2 * u + v).sum(),
        lower_loss=lambda u, v: (-u * v.square() / 2 - v.pow(4) / 4).sum(),
        start=uniform_start((-1, 1), (-1, 1)),
        best_lower=lambda u: torch.where(u < -0.5, 0 * u, -1.0),
        exact_hypergradient=lambda u: torch.full_like(u, 2.0),
        optimal_value=-2.0,
        solutions=((vector(-1), vector(0)), (vector(-0.5), vector(-1))),
        upper_box=(-1.0, 1.0),
        lower_box=(-1.0, 1.0),
    )


def mb_2007_17() -> Problem:
    r"""The lower minimum branches in two.

    .. math:: g = \tfrac12 uv^2 + \tfrac14 v^4, \quad f = (u + \tfrac12)^2 + \tfrac12 v^2,
        \quad -1 \le u, v \le 1

    v* = sqrt(-u) or -sqrt(-u) for u < 0, else 0; u* = -1/4, v* = 1/2 or -1/2, f* = 3/16.
    ``best_lower`` gives the positive branch.
    """

    def hypergradient(u: Tensor) -> Tensor:
        return 2 * u + 1 - 0.5 * (u < 0)

    return Problem(
        name="mb_2007_17",
        title="branching lower minimum",
        source="Mitsos & Barton (2006), example 3.17; BASBLib mb_2007_17",
        traps="v = 0 is stationary for every u, a maximum of g for u < 0; there f is smaller.",
        tags=_TIED | {"many_solutions"},
        upper_loss=lambda u, v: ((u + 0.5).square() + v.square() / 2).sum(),
        lower_loss=lambda u, v: (u * v.square() / 2 + v.pow(4) / 4).sum(),
        start=uniform_start((-1, 1), (-1, 1)),
        best_lower=lambda u: (-u).clamp(min=0).sqrt(),
        exact_hypergradient=hypergradient,
        optimal_value=3 / 16,
        solutions=((vector(-0.25), vector(0.5)), (vector(-0.25), vector(-0.5))),
        upper_box=(-1.0, 1.0),
        lower_box=(-1.0, 1.0),
    )


def morgan_patrone() -> Problem:
    r"""A bilinear lower level, indifferent at the solution.

    .. math:: g = uv, \quad f = -(u + v), \quad -\tfrac12 \le u \le \tfrac12, \quad -1 \le v \le 1

    v* = 1 for u < 0 and -1 for u > 0; at u = 0 every v is minimal and the optimistic one is 1:
    u* = 0, v* = 1, f* = -1. Just above, f is +1.
    """
    return Problem(
        name="morgan_patrone",
        title="bilinear lower level",
        source="Morgan & Patrone (2006), example a; BOLIB MorganPatrone2006a",
        traps="g has no curvature at all, v* lies on a bound, and f jumps by 2 at the solution.",
        tags=frozenset({"singular", "nonunique", "discontinuous", "constrained", "library"}),
        upper_loss=lambda u, v: -(u + v).sum(),
        lower_loss=lambda u, v: (u * v).sum(),
        start=uniform_start((-0.5, 0.5), (-1, 1)),
        best_lower=lambda u: torch.where(u <= 0, torch.ones_like(u), -1.0),
        optimal_value=-1.0,
        solutions=((vector(0), vector(1)),),
        upper_box=(-0.5, 0.5),
        lower_box=(-1.0, 1.0),
    )


def lmp_1987_01() -> Problem:
    r"""A solution with no neighbours.

    .. math:: g = (u - 1) v, \quad f = \tfrac12 (1 - u) + uv, \quad 0 \le u, v \le 1

    v* = 1 for u < 1, where f = (1 + u)/2; at u = 1 every v is minimal and the optimistic v* = 0
    gives f* = 0. (Pessimistically there is no solution.)
    """
    return Problem(
        name="lmp_1987_01",
        title="isolated solution",
        source="Lucchetti, Mignanego & Pieri (1987); BASBLib lmp_1987_01",
        traps="Descent on f(u, v*(u)) ends at u = 0 with f = 1/2; the solution is a single point.",
        tags=frozenset({"singular", "nonunique", "discontinuous", "constrained", "library"}),
        upper_loss=lambda u, v: ((1 - u) / 2 + u * v).sum(),
        lower_loss=lambda u, v: ((u - 1) * v).sum(),
        start=uniform_start((0, 1), (0, 1)),
        best_lower=lambda u: torch.where(u < 1, torch.ones_like(u), 0.0),
        optimal_value=0.0,
        solutions=((vector(1), vector(0)),),
        upper_box=(0.0, 1.0),
        lower_box=(0.0, 1.0),
    )


def mirrlees() -> Problem:
    r"""Why stationarity is not enough.

    .. math:: g = -u e^{-(v + 1)^2} - e^{-(v - 1)^2}, \quad -2 \le v \le 2, \qquad
        f = (u - 2)^2 + (v - 1)^2

    Two wells, the right one deeper for u < 1, the left one for u > 1. So u* = 1 and v* = 0.95750,
    the root of v = tanh(2v); f* = 1 + (v* - 1)^2. Stationary points of g do better, up to
    u = 1.99, v = 0.895 with f = 0.011, but there v is the shallower well.
    """

    def well(u: Tensor) -> Tensor:
        """The root near 1 of v - 1 + u (v + 1) exp(-4v), u <= 1, by Newton's method."""
        v = torch.ones_like(u)
        for _ in range(20):
            decay = u * (-4 * v).exp()
            v = v - (v - 1 + (v + 1) * decay) / (1 - (4 * v + 3) * decay)
        return v

    def mirrored(u: Tensor) -> Tensor:
        """u, or 1/u where the left well is deeper: (u, v) -> (1/u, -v) scales g."""
        return torch.where(u > 1, 1 / u.clamp(min=1), u)

    def best_lower(u: Tensor) -> Tensor:
        v = well(mirrored(u)).clamp(max=2)
        return torch.where(u > 1, -v, v)

    def hypergradient(u: Tensor) -> Tensor:
        w = mirrored(u)
        v = well(w)
        decay = (-4 * v).exp()
        slope = -(v + 1) * decay / (1 - (4 * v + 3) * w * decay)
        slope = torch.where(u > 1, slope * w.square(), slope)
        return 2 * (u - 2) + 2 * (best_lower(u) - 1) * slope

    v_best = best_lower(vector(1))
    return Problem(
        name="mirrlees",
        title="two wells of changing depth",
        source="Mirrlees (1999), the moral-hazard example; BOLIB Mirrlees1999",
        traps="Replacing the lower level by its stationarity gives u = 1.99 and f = 0.011: wrong.",
        tags=_TIED | {"discontinuous"},
        upper_loss=lambda u, v: ((u - 2).square() + (v - 1).square()).sum(),
        lower_loss=lambda u, v: -(u * (-(v + 1).square()).exp() + (-(v - 1).square()).exp()).sum(),
        start=uniform_start((0, 3), (-2, 2)),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=1 + float((v_best - 1).square()),
        solutions=((vector(1), v_best),),
        lower_box=(-2.0, 2.0),
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mb_2007_14": mb_2007_14,
    "mb_2007_16": mb_2007_16,
    "mb_2007_17": mb_2007_17,
    "morgan_patrone": morgan_patrone,
    "lmp_1987_01": lmp_1987_01,
    "mirrlees": mirrlees,
}
