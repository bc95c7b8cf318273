"""Problems whose lower level has one minimum and an invertible Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .draws import generator, matrix, normal, normal_start, positive_definite, vector
from .protocol import Problem


def quadratic(kappa: float = 10.0, n_upper: int = 4, n_lower: int = 6, seed: int = 0) -> Problem:
    r"""Both levels quadratic; ``kappa`` is the condition number of A.

    .. math::
        g = \tfrac12 v'Av + u'Cv + a'v, \qquad
        f = \tfrac12 v'Fv + \tfrac12 u'Hu + u'Kv + p'v + s'u

    v* = -A^{-1}(C'u + a) and the hypergradient is Hu + Kv* + s - C A^{-1}(Fv* + K'u + p).
    """
    source = generator(seed)
    A = positive_definite(source, n_lower, kappa)
    C, a = normal(source, n_upper, n_lower), normal(source, n_lower)
    joint = positive_definite(source, n_upper + n_lower, 10.0)
    H, K, F = joint[:n_upper, :n_upper], joint[:n_upper, n_upper:], joint[n_upper:, n_upper:]
    s, p = normal(source, n_upper), normal(source, n_lower)

    def best_lower(u: Tensor) -> Tensor:
        return -torch.linalg.solve(A, C.T @ u + a)

    def hypergradient(u: Tensor) -> Tensor:
        v = best_lower(u)
        return H @ u + K @ v + s - C @ torch.linalg.solve(A, F @ v + K.T @ u + p)

    def upper_loss(u: Tensor, v: Tensor) -> Tensor:
        return v @ F @ v / 2 + u @ H @ u / 2 + u @ K @ v + p @ v + s @ u

    slope, offset = -torch.linalg.solve(A, C.T), best_lower(torch.zeros_like(s))
    reduced = H + K @ slope + slope.T @ K.T + slope.T @ F @ slope
    u_best = -torch.linalg.solve(reduced, K @ offset + s + slope.T @ (F @ offset + p))
    v_best = best_lower(u_best)
    return Problem(
        name="quadratic",
        title="quadratic on quadratic",
        source="textbook",
        traps="The penalised lower Hessian F + gamma A^2 has the square of A's condition number.",
        tags=frozenset({"nonsingular"}),
        upper_loss=upper_loss,
        lower_loss=lambda u, v: v @ A @ v / 2 + u @ C @ v + a @ v,
        start=normal_start(n_upper, n_lower),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=float(upper_loss(u_best, v_best)),
        solutions=((u_best, v_best),),
        kappa=kappa,
    )


def scalar_ridge() -> Problem:
    r"""One ridge weight, one coefficient.

    .. math:: g = \tfrac12 (2v - 3)^2 + \tfrac12 e^u v^2, \qquad f = \tfrac12 (1.5 v - 1)^2

    v* = 6 / (4 + e^u), so u* = ln 5, v* = 2/3, f* = 0.
    """

    def best_lower(u: Tensor) -> Tensor:
        return 6 / (4 + u.exp())

    def hypergradient(u: Tensor) -> Tensor:
        v = best_lower(u)
        return -1.5 * (1.5 * v - 1) * u.exp() * v / (4 + u.exp())

    return Problem(
        name="scalar_ridge",
        title="scalar ridge regression",
        source="textbook",
        traps="The hypergradient dies out for u -> -inf and u -> +inf.",
        tags=frozenset({"nonsingular"}),
        upper_loss=lambda u, v: (1.5 * v - 1).square().sum() / 2,
        lower_loss=lambda u, v: ((2 * v - 3).square() + u.exp() * v.square()).sum() / 2,
        start=normal_start(1, 1),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.0,
        solutions=((vector(math.log(5)), vector(2 / 3)),),
    )


def feature_ridge(
    kappa: float = 10.0, samples: int = 12, features: int = 5, seed: int = 0
) -> Problem:
    r"""One ridge weight per feature; ``kappa`` is the condition number of X'X.

    .. math::
        g = \tfrac{1}{2N}\lVert Xv - y\rVert^2 + \tfrac12 \sum_j e^{u_j} v_j^2, \qquad
        f = \tfrac{1}{2N}\lVert Zv - z\rVert^2

    With (X'X/N + diag e^u) q = Z'(Zv - z)/N the hypergradient is -e^u v q. The targets z = Z v*(u°)
    come from chosen weights u°, so f* = 0 at u° and, v* being one-to-one in u, only there.
    """
    source = generator(seed)
    X = math.sqrt(samples) * matrix(source, samples, features, kappa)
    Z, y = normal(source, samples, features), normal(source, samples)

    def hessian(u: Tensor) -> Tensor:
        return X.T @ X / samples + torch.diag(u.exp())

    def best_lower(u: Tensor) -> Tensor:
        return torch.linalg.solve(hessian(u), X.T @ y / samples)

    u_best = normal(source, features)
    v_best = best_lower(u_best)
    z = Z @ v_best

    def hypergradient(u: Tensor) -> Tensor:
        v = best_lower(u)
        q = torch.linalg.solve(hessian(u), Z.T @ (Z @ v - z) / samples)
        return -u.exp() * v * q

    def lower_loss(u: Tensor, v: Tensor) -> Tensor:
        return (X @ v - y).square().sum() / (2 * samples) + (u.exp() * v.square()).sum() / 2

    return Problem(
        name="feature_ridge",
        title="ridge regression, one weight per feature",
        source="hyperparameter optimisation; the regulariser of benchopt/benchmark_bilevel",
        traps="Features with small coefficients have almost no hypergradient: converges unevenly.",
        tags=frozenset({"nonsingular"}),
        upper_loss=lambda u, v: (Z @ v - z).square().sum() / (2 * samples),
        lower_loss=lower_loss,
        start=normal_start(features, features),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.0,
        solutions=((u_best, v_best),),
        kappa=kappa,
    )


def weighted_cleaning(
    kappa: float = 10.0, samples: int = 12, features: int = 4, seed: int = 0
) -> Problem:
    r"""Data cleaning by least squares: one weight per sample; ``kappa`` belongs to X'X.

    .. math::
        g = \tfrac{1}{2N}\sum_i \sigma(u_i) (x_i'v - y_i)^2 + \tfrac{\rho}{2}\lVert v\rVert^2,
        \qquad f = \tfrac{1}{2N}\lVert Z(v - v^\circ)\rVert^2, \quad \rho = 0.1

    v° = v*(u°) for chosen weights u°, so f* = 0. With (X'SX/N + rho I) q = grad f, S = diag(s),
    s = sigma(u): the hypergradient is -s(1 - s)(Xv - y)(Xq)/N. Optimal is every u whose weights
    solve X' diag(Xv° - y) s / N = -rho v°: an affine set in s, in which the error is measured.
    """
    source = generator(seed)
    rho = 0.1
    X = math.sqrt(samples) * matrix(source, samples, features, kappa)
    y = X @ normal(source, features)
    y[::3] += 3 * normal(source, len(y[::3]))  # a third of the samples is wrong
    Z = normal(source, samples, features)

    def hessian(s: Tensor) -> Tensor:
        identity = torch.eye(features, dtype=torch.float64)
        return X.T @ (s[:, None] * X) / samples + rho * identity

    def best_lower(u: Tensor) -> Tensor:
        s = u.sigmoid()
        return torch.linalg.solve(hessian(s), X.T @ (s * y) / samples)

    def hypergradient(u: Tensor) -> Tensor:
        s, v = u.sigmoid(), best_lower(u)
        q = torch.linalg.solve(hessian(s), Z.T @ (Z @ (v - v_best)) / samples)
        return -s * (1 - s) * (X @ v - y) * (X @ q) / samples

    def lower_loss(u: Tensor, v: Tensor) -> Tensor:
        fit = (u.sigmoid() * (X @ v - y).square()).sum() / (2 * samples)
        return fit + rho * v.square().sum() / 2

    u_best = normal(source, samples)
    v_best = best_lower(u_best)
    balance = X.T * (X @ v_best - y) / samples
    inverse = torch.linalg.pinv(balance)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        weights = inverse @ (balance @ u.sigmoid() + rho * v_best)
        return (weights.square().sum() + (v - v_best).square().sum()).sqrt()

    return Problem(
        name="weighted_cleaning",
        title="data cleaning, one weight per sample",
        source="hyper-cleaning (Franceschi et al., 2017) with squared losses",
        traps="More upper than lower unknowns: many weights are optimal; compare v, not u.",
        tags=frozenset({"nonsingular", "many_solutions"}),
        upper_loss=lambda u, v: (Z @ (v - v_best)).square().sum() / (2 * samples),
        lower_loss=lower_loss,
        start=normal_start(samples, features),
        best_lower=best_lower,
        exact_hypergradient=hypergradient,
        optimal_value=0.0,
        solutions=((u_best, v_best),),
        distance=distance,
        kappa=kappa,
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "quadratic": quadratic,
    "scalar_ridge": scalar_ridge,
    "feature_ridge": feature_ridge,
    "weighted_cleaning": weighted_cleaning,
}
