"""Problems on which something that is usually assumed fails; each says what in ``traps``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .draws import generator, matrix, normal, normal_start, uniform_start, vector
from .protocol import Problem

_CORNERS = ((1.0, 3.0), (3.0, 1.0), (-2.0, 2.0), (-3.0, -2.0))


def coreset() -> Problem:
    r"""Mixing weights for four points c_i, u their logits.

    .. math:: g = \lVert v - \sum_i p_i c_i\rVert^2, \quad p = \mathrm{softmax}(u), \qquad
        f = 0.1 \lVert v - (3, -2)\rVert^2

    The nearest point of the hull of the c_i is v* = (1.8, 0.4) with the weights (0, 0.8, 0, 0.2)
    and f* = 0.72; the softmax only comes close. Errors are measured in (p, v).
    """
    corners = torch.tensor(_CORNERS, dtype=torch.float64)
    target, weights, nearest = vector(3, -2), vector(0, 0.8, 0, 0.2), vector(1.8, 0.4)

    def best_lower(u: Tensor) -> Tensor:
        return u.softmax(0) @ corners

    def hypergradient(u: Tensor) -> Tensor:
        p = u.softmax(0)
        slope = corners @ (0.2 * (p @ corners - target))
        return p * (slope - p @ slope)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        gap = (u.softmax(0) - weights).square().sum() + (v - nearest).square().sum()
        return gap.sqrt()

    return Problem(
        name="coreset",
        title="mixing weights of four points",
        source="BOME (Liu et al., 2022), coreset toy",
        traps="The best logits lie at infinity: u grows without bound and the hypergradient dies.",
        tags=frozenset({"nonsingular", "unattained"}),
        upper_loss=lambda u, v: 0.1 * (v - target).square().sum(),
        lower_loss=lambda u, v: (v - best_lower(u)).square().sum(),
        start=normal_start(4, 2),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.72,
        distance=distance,
    )


def free_coordinate() -> Problem:
    r"""A lower level that leaves one coordinate free.

    .. math:: g = \tfrac12 v_0^2 - u v_0, \qquad f = \tfrac12 (u - v_1)^2 + \tfrac12 (v_0 - 1)^2

    v_0 = u and v_1 is free; the optimistic choice is v_1 = u, so u* = v_0 = v_1 = 1, f* = 0.
    """
    return Problem(
        name="free_coordinate",
        title="least squares with a free coordinate",
        source="BOME (Liu et al., 2022), least-squares toy",
        traps="The Hessian is diag(1, 0): implicit differentiation divides by zero.",
        tags=frozenset({"singular", "nonunique"}),
        upper_loss=lambda u, v: ((u - v[1:]).square() + (v[:1] - 1).square()).sum() / 2,
        lower_loss=lambda u, v: (v[:1].square() / 2 - u * v[:1]).sum(),
        start=normal_start(1, 2),
        best_lower=lambda u: torch.cat([u, u]),
        optimal_value=0.0,
        solutions=((vector(1), vector(1, 1)),),
    )


def least_squares(
    kappa: float = 10.0, rank: int = 3, n_upper: int = 3, n_lower: int = 6, seed: int = 0
) -> Problem:
    r"""Underdetermined least squares; A is rank x n_lower, ``kappa`` belongs to AA'.

    .. math:: g = \tfrac12 \lVert Av - Bu\rVert^2, \qquad
        f = \tfrac12 \lVert v - c\rVert^2 + \tfrac12 \lVert u - d\rVert^2

    The optimistic v*(u) = c + A^+(Bu - Ac) is the solution nearest to c, so with R = A^+B:
    u* = (I + R'R)^{-1} (d + R'A^+Ac).
    """
    if rank >= n_lower:
        raise ValueError(f"rank must be < n_lower = {n_lower}, got {rank}")
    source = generator(seed)
    A, B = matrix(source, rank, n_lower, kappa), normal(source, rank, n_upper)
    c, d = normal(source, n_lower), normal(source, n_upper)
    inverse = torch.linalg.pinv(A)
    R, inside = inverse @ B, inverse @ (A @ c)

    def best_lower(u: Tensor) -> Tensor:
        return c + R @ u - inside

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return ((v - c).square().sum() + (u - d).square().sum()) / 2

    identity = torch.eye(n_upper, dtype=torch.float64)
    u_best = torch.linalg.solve(identity + R.T @ R, d + R.T @ inside)
    v_best = best_lower(u_best)
    return Problem(
        name="least_squares",
        title="underdetermined least squares",
        source="n-dimensional form of free_coordinate; A'A as in Mehra & Hamm (2021)",
        traps="The Hessian A'A has a null space in which f alone decides.",
        tags=frozenset({"singular", "nonunique"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: (A @ v - B @ u).square().sum() / 2,
        start=normal_start(n_upper, n_lower),
        best_lower=best_lower,
        optimal_value=float(upper_loss(u_best, v_best)),
        solutions=((u_best, v_best),),
        kappa=kappa,
    )


def sine(dimension: int = 1) -> Problem:
    r"""A lower level with infinitely many minima and maxima; v has ``dimension`` entries n.

    .. math:: g = \sum_i \sin(u + v_i - 2), \qquad f = (u - 2)^2 + \sum_i (v_i - 4)^2

    Minima are v_i = t + 2 - u with t = -pi/2 + 2 pi k. For t = 3 pi/2: u* = (2 + n(t - 2))/(1 + n),
    f* = n (t - 4)^2 / (1 + n); for n = 1 that is u* = 3 pi/4 and f* = 0.2538. The next best, all
    v_i in the well k = 0, costs 61 times as much (checked on a grid for n = 1).
    """
    n, t = dimension, 1.5 * math.pi

    def best_lower(u: Tensor) -> Tensor:
        wells = ((u + 2 + math.pi / 2) / (2 * math.pi)).round()
        return (2 - u - math.pi / 2 + 2 * math.pi * wells).expand(n)

    def hypergradient(u: Tensor) -> Tensor:
        return 2 * (u - 2) - 2 * (best_lower(u) - 4).sum()

    u_best = vector((2 + n * (t - 2)) / (1 + n))
    return Problem(
        name="sine",
        title="sinusoidal lower level",
        source="Liu et al. (2021), non-convex lower level",
        traps="Maxima of g are stationary too, and all its minima are equally deep.",
        tags=frozenset({"nonsingular", "nonunique", "nonconvex"}),
        upper_loss=lambda u, v: (u - 2).square().sum() + (v - 4).square().sum(),
        lower_loss=lambda u, v: (u + v - 2).sin().sum(),
        start=uniform_start((-4, 8), (-4, 8), 1, n),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=n * (t - 4) ** 2 / (1 + n),
        solutions=((u_best, (t + 2 - u_best).expand(n)),),
    )


def ripple() -> Problem:
    r"""Both levels non-convex, one lower minimum.

    .. math::
        g = (u + v)^2 + u \sin^2(u + v), \qquad
        f = \frac{\cos(4v + 2)}{1 + e^{2 - 4u}} + \tfrac12 \ln((4u - 2)^2 + 1), \quad 0 \le u \le 3

    v* = -u. With s = 1 / (1 + e^{2-4u}) the hypergradient is 4 s (1 - s) cos(2 - 4u)
    + 4 s sin(2 - 4u) + (16 u - 8) / ((4u - 2)^2 + 1). Local minima at u = 0.38236 (0.4427),
    1.21515 (0.1999, the global one, checked on a grid) and 2.82964 (1.2435).
    """

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        wave = (4 * v + 2).cos() / (1 + (2 - 4 * u).exp())
        return (wave + ((4 * u - 2).square() + 1).log() / 2).sum()

    def hypergradient(u: Tensor) -> Tensor:
        s = (4 * u - 2).sigmoid()
        wave = 4 * s * (1 - s) * (2 - 4 * u).cos() + 4 * s * (2 - 4 * u).sin()
        return wave + (16 * u - 8) / ((4 * u - 2).square() + 1)

    u_best = vector(1.2151454754759206)  # the root of the hypergradient between 1.1 and 1.3
    return Problem(
        name="ripple",
        title="non-convex in both levels",
        source="PBGD (Shen & Chen, 2023), toy problem",
        traps=(
            "|dg/dv|^2 has minima with dg/dv != 0 for u > 1 (at u = 2, v = 0.0944); and the upper "
            "level has worse local minima at both sides."
        ),
        tags=frozenset({"nonsingular", "nonconvex", "constrained"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: ((u + v).square() + u * (u + v).sin().square()).sum(),
        start=uniform_start((0, 3), (-4, 4)),
        best_lower=lambda u: -u,
        exact_hypergradient=hypergradient,
        optimal_value=float(upper_loss(u_best, -u_best)),
        solutions=((u_best, -u_best),),
        upper_box=(0.0, 3.0),
    )


def flat() -> Problem:
    r"""A lower minimum without curvature.

    .. math:: g = \tfrac14 (v - u)^4, \qquad f = \tfrac12 (v - 1)^2 + \tfrac12 u^2

    v* = u, so u* = v* = 1/2 and f* = 1/4, but d2g/dv2 = 0 there.
    """
    return Problem(
        name="flat",
        title="quartic lower level",
        source="textbook",
        traps=(
            "The multiplier would be infinite: with weight gamma the stationarity penalty is off "
            "by gamma^(-1/5), the value penalty by gamma^(-1/3)."
        ),
        tags=frozenset({"singular"}),
        upper_loss=lambda u, v: ((v - 1).square() + u.square()).sum() / 2,
        lower_loss=lambda u, v: (v - u).pow(4).sum() / 4,
        start=normal_start(1, 1),
        best_lower=lambda u: u.clone(),
        optimal_value=0.25,
        solutions=((vector(0.5), vector(0.5)),),
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "coreset": coreset,
    "free_coordinate": free_coordinate,
    "least_squares": least_squares,
    "sine": sine,
    "ripple": ripple,
    "flat": flat,
}
