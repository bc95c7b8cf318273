"""The synthetic problems of Mehra & Hamm (2021): two in the plane, and SMD20 to SMD24.

The SMD problems are those of the authors' released code. They have nothing but the letters in
common with the SMD suite of Sinha, Malo and Deb.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .draws import generator, normal, uniform_start, vector
from .protocol import Loss, Map, Problem

_SOURCE = "Mehra & Hamm (2021), github.com/hammlab/bilevel-penalty"


def indefinite() -> Problem:
    r"""Bounded below only on the lower solutions.

    .. math:: f = v^2 - (u - v)^2, \qquad g = (u - v)^2

    v* = u, f(u, v*) = u^2, so u* = v* = 0 and f* = 0.
    """
    return Problem(
        name="mehra_hamm_indefinite",
        title="indefinite upper loss",
        source=_SOURCE,
        traps=(
            "f + (gamma/2) |dg/dv|^2 is unbounded below for gamma < 1/2; and df/du = 0 on the "
            "lower solutions, so alternating descent never moves u."
        ),
        tags=frozenset({"nonsingular", "synthetic"}),
        upper_loss=lambda u, v: (v.square() - (u - v).square()).sum(),
        lower_loss=lambda u, v: (u - v).square().sum(),
        start=uniform_start((-5, 5), (-5, 5)),
        best_lower=lambda u: u.clone(),
        exact_hypergradient=lambda u: 2 * u,
        optimal_value=0.0,
        solutions=((vector(0), vector(0)),),
    )


def convex() -> Problem:
    r"""The one the authors' README begins with.

    .. math:: f = u^2 + v^2, \qquad g = (1 - u - v)^2

    v* = 1 - u, so u* = v* = 1/2 and f* = 1/2.
    """
    return Problem(
        name="mehra_hamm_convex",
        title="quadratic on a line",
        source=_SOURCE,
        traps="None: a method that fails here has a sign wrong.",
        tags=frozenset({"nonsingular", "synthetic"}),
        upper_loss=lambda u, v: (u.square() + v.square()).sum(),
        lower_loss=lambda u, v: (1 - u - v).square().sum(),
        start=uniform_start((-5, 5), (-5, 5)),
        best_lower=lambda u: 1 - u,
        exact_hypergradient=lambda u: 4 * u - 2,
        optimal_value=0.5,
        solutions=((vector(0.5), vector(0.5)),),
    )


def smd(number: int, block: int = 10, rows: int = 5, seed: int = 0) -> Problem:
    r"""SMD20 to SMD24, u and v of 2 ``block`` entries.

    A is block diagonal with two normal blocks of ``rows`` x ``block``; P projects on its row space.

    ====  ==========================  ====================  ======================================
    20    f = |u|^2 + |v|^2 - 1       g = |1 - u - v|^2     u* = v* = 1/2, f* = block - 1
    21    f = |v|^2 - |u - v|^2       g = |u - v|^2         u* = v* = 0, f* = 0
    22    f = |Av|^2 - |A(u - v)|^2   g = |A(u - v)|^2      Pu* = Pv* = 0, f* = 0
    23    f = |v|^2 - |A(u - v)|^2    g = |A(u - v)|^2      Pu* = v* = 0, f* = 0
    24    f = |u|^2 + |v|^2           g = |A(1 - u - v)|^2  u* = v* = P 1/2, f* = |P 1|^2 / 2
    ====  ==========================  ====================  ======================================

    The optimistic v*(u) is 1 - u, u, u (or any u + ker A), Pu and P(1 - u). ``rows=block`` makes A
    invertible and P = I.

    Differs from the source: it clips both levels to [-5, 5], whose inside holds the solutions, but
    not every v*(u); and its error for SMD24 ignores the null space of A, in which the solution is
    unique all the same. ``published_error`` is the source's.
    """
    if not 1 <= rows <= block:
        raise ValueError(f"rows must lie between 1 and block = {block}, got {rows}")
    if number not in _NAMES:
        raise ValueError(f"number must be one of {sorted(_NAMES)}, got {number}")
    size, source = 2 * block, generator(seed)
    blocks = torch.block_diag(normal(source, rows, block), normal(source, rows, block))
    identity = torch.eye(size, dtype=torch.float64)
    singular = number >= 22 and rows < block
    A = blocks if number >= 22 else identity
    P = torch.linalg.pinv(A) @ A if singular else identity
    one, zero = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    anchored = number in (20, 24)
    center = one / 2 if anchored else zero
    solution = P @ center
    upper_loss = _upper_loss(number, A)

    def lower_loss(u: Tensor, v: Tensor) -> Tensor:
        return (A @ (1 - u - v if anchored else u - v)).square().sum()

    def best_lower(u: Tensor) -> Tensor:
        if number == 22:
            return u.clone()
        return P @ (1 - u if anchored else u)

    def published_error(u: Tensor, v: Tensor) -> Tensor:
        gap_v = v if number == 23 else P @ (v - center)
        return ((P @ (u - center)).square().sum() + gap_v.square().sum()).sqrt()

    exact: dict[int, Map] = {
        20: lambda u: 4 * u - 2,
        21: lambda u: 2 * u,
        22: lambda u: 2 * A.T @ (A @ u),
        23: lambda u: 2 * u,
        24: lambda u: 4 * u - 2,
    }
    many = singular and number in (22, 23)
    tags = {"synthetic", "singular", "nonunique"} if singular else {"synthetic", "nonsingular"}
    return Problem(
        name=f"smd{number}",
        title=f"SMD{number}: {_NAMES[number]}",
        source=_SOURCE,
        traps=_TRAPS[number],
        tags=frozenset(tags | ({"many_solutions"} if many else set[str]())),
        upper_loss=upper_loss,
        lower_loss=lower_loss,
        start=uniform_start((-5, 5), (-5, 5), size, size),
        best_lower=best_lower,
        exact_hypergradient=None if singular else exact[number],
        optimal_value=float(upper_loss(solution, solution)),
        solutions=((solution, solution),),
        distance=published_error if many else None,
        published_error=published_error,
    )


def _upper_loss(number: int, A: Tensor) -> Loss:
    def square(x: Tensor) -> Tensor:
        return x.square().sum()

    losses: dict[int, Loss] = {
        20: lambda u, v: square(u) + square(v) - 1,
        21: lambda u, v: square(v) - square(u - v),
        22: lambda u, v: square(A @ v) - square(A @ (u - v)),
        23: lambda u, v: square(v) - square(A @ (u - v)),
        24: lambda u, v: square(u) + square(v),
    }
    return losses[number]


_NAMES = {
    20: "convex",
    21: "indefinite upper loss",
    22: "rank-deficient, f blind to the null space",
    23: "rank-deficient, indefinite upper loss",
    24: "rank-deficient, convex",
}
_UNBOUNDED = "Unbounded below off the lower solutions for small gamma."
_TRAPS = {
    20: "None: a method that fails here has a sign wrong.",
    21: _UNBOUNDED + " df/du = 0 on the lower solutions: alternating descent never moves u.",
    22: _UNBOUNDED + " Neither level sees the null space of A: errors must be projected.",
    23: _UNBOUNDED + " In the null space of A f alone decides on v.",
    24: "In the null space of A f alone decides on u and v, slowly if lambda g dominates.",
}

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mehra_hamm_indefinite": indefinite,
    "mehra_hamm_convex": convex,
    **{f"smd{number}": partial(smd, number) for number in _NAMES},
}
