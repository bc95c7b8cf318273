"""Lower levels that are not a fit to data: the inner player of a game, an equilibrium layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .draws import generator, normal, normal_start
from .protocol import Problem


def minimax(strength: float = 0.7, n_upper: int = 3, n_lower: int = 4, seed: int = 0) -> Problem:
    r"""A saddle point as a bilevel problem, g = -f; ``strength`` is mu > 0.

    .. math:: f = \tfrac12 \lVert u\rVert^2 + u'Bv - \tfrac{\mu}{2}\lVert v - c\rVert^2

    v* = c + B'u/mu, the hypergradient is u + Bv* and u* = -(I + BB'/mu)^{-1} Bc.
    """
    source = generator(seed)
    B, c = normal(source, n_upper, n_lower), normal(source, n_lower)

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return u @ u / 2 + u @ B @ v - strength * (v - c).square().sum() / 2

    def best_lower(u: Tensor) -> Tensor:
        return c + B.T @ u / strength

    identity = torch.eye(n_upper, dtype=torch.float64)
    u_best = -torch.linalg.solve(identity + B @ B.T / strength, B @ c)
    v_best = best_lower(u_best)
    return Problem(
        name="minimax",
        title="quadratic saddle point",
        source="minimax special case g = -f",
        traps="The adjoint is zero at the lower solution; plain descent on both levels can cycle.",
        tags=frozenset({"nonsingular", "minimax"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: -upper_loss(u, v),
        start=normal_start(n_upper, n_lower),
        best_lower=best_lower,
        exact_hypergradient=lambda u: u + B @ best_lower(u),
        optimal_value=float(upper_loss(u_best, v_best)),
        solutions=((u_best, v_best),),
    )


def fixed_point(
    contraction: float = 0.8, n_upper: int = 3, n_lower: int = 5, seed: int = 0
) -> Problem:
    r"""An equilibrium layer; ``contraction`` is the spectral norm of W, below 1.

    .. math:: v = \Phi(u, v) = \tanh(Wv + Uu), \qquad f = \tfrac12 \lVert v - v^\circ\rVert^2

    v° is the equilibrium of a chosen u°, so f* = 0, and U has full column rank, so only at u°.
    With D = diag(1 - v^2): the hypergradient is (DU)'(I - DW)^{-T}(v - v°).
    """
    if not 0 < contraction < 1:
        raise ValueError(f"contraction must lie between 0 and 1, got {contraction}")
    source = generator(seed)
    mixing, U = normal(source, n_lower, n_lower), normal(source, n_lower, n_upper)
    W = contraction * mixing / torch.linalg.matrix_norm(mixing, 2)
    rounds = math.ceil(math.log(1e-17) / math.log(contraction))

    def lower_map(u: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(W @ v + U @ u)

    def best_lower(u: Tensor) -> Tensor:
        v = torch.zeros(n_lower, dtype=torch.float64)
        for _ in range(rounds):
            v = lower_map(u, v)
        return v

    u_best = normal(source, n_upper)
    v_best = best_lower(u_best)

    def hypergradient(u: Tensor) -> Tensor:
        v = best_lower(u)
        D = 1 - v.square()
        identity = torch.eye(n_lower, dtype=torch.float64)
        q = torch.linalg.solve((identity - D[:, None] * W).T, v - v_best)
        return (D[:, None] * U).T @ q

    return Problem(
        name="fixed_point",
        title="equilibrium layer",
        source="deep equilibrium models (Bai, Kolter & Koltun, 2019)",
        traps="I - dPhi/dv is not symmetric: its transpose is needed, conjugate gradients fail.",
        tags=frozenset({"nonsingular", "fixed_point"}),
        upper_loss=lambda u, v: (v - v_best).square().sum() / 2,
        lower_map=lower_map,
        start=normal_start(n_upper, n_lower),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.0,
        solutions=((u_best, v_best),),
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "minimax": minimax,
    "fixed_point": fixed_point,
}
