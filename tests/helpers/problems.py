"""Bilevel problems whose answers are known.

Letters as in the package: u upper, v lower, f upper loss, g lower loss, r = grad_v g,
H = d2g/dv2, J = d2g/du dv (n_u x n_v), q = -H^{-1} grad_v f the adjoint.
Losses here are pure, ``loss(upper, lower)``; every problem brings its own random generator, so
nothing depends on the seed or the default dtype of the session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_penalty_bilevel.tensors import Pair

Tensors = tuple[Tensor, ...]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def spd(n: int, seed: int, condition: float = 10.0) -> Tensor:
    """A random symmetric positive definite matrix with eigenvalues 1 .. condition."""
    basis = torch.linalg.qr(normal(n, n, seed=seed)).Q
    eigenvalues = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def split(vector: Tensor, shapes: Sequence[Sequence[int]]) -> Tensors:
    """A vector cut into tensors of the given shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = torch.split(vector, sizes)
    return tuple(p.reshape(tuple(s)) for p, s in zip(parts, shapes, strict=True))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The inverse of ``split``."""
    return torch.cat([t.reshape(-1) for t in tensors])


def leaves(tensors: Sequence[Tensor]) -> Tensors:
    """Copies that require grad."""
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


# The quadratic: everything in closed form, each level over two tensors of other shapes.


@dataclass(frozen=True)
class Quadratic:
    r"""g = v'Av/2 + u'Cv + a'v and f = v'Fv/2 + u'Bu/2 + u'Kv + p'v + s'u.

    So r = Av + C'u + a, H = A, J = C, v* = -A^{-1}(C'u + a).
    """

    A: Tensor
    C: Tensor
    a: Tensor
    F: Tensor
    B: Tensor
    K: Tensor
    p: Tensor
    s: Tensor

    upper_shapes = ((2,), (1, 2))
    lower_shapes = ((3,), (2, 2))
    n_upper = 4
    n_lower = 7

    @classmethod
    def random(cls, seed: int = 0, condition: float = 10.0) -> Quadratic:
        m, n = cls.n_upper, cls.n_lower
        base = 100 * seed
        return cls(
            A=spd(n, base, condition),
            C=normal(m, n, seed=base + 1),
            a=normal(n, seed=base + 2),
            F=spd(n, base + 3),
            B=spd(m, base + 4),
            K=normal(m, n, seed=base + 5),
            p=normal(n, seed=base + 6),
            s=normal(m, seed=base + 7),
        )

    def point(self, seed: int = 50) -> Pair:
        """A random (u, v), not a solution."""
        return Pair(
            split(normal(self.n_upper, seed=seed), self.upper_shapes),
            split(normal(self.n_lower, seed=seed + 1), self.lower_shapes),
        )

    def direction(self, seed: int = 60) -> Tensors:
        return split(normal(self.n_lower, seed=seed), self.lower_shapes)

    def f(self, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> Tensor:
        u, v = join(upper), join(lower)
        return v @ self.F @ v / 2 + u @ self.B @ u / 2 + u @ self.K @ v + self.p @ v + self.s @ u

    def g(self, upper: Sequence[Tensor], lower: Sequence[Tensor]) -> Tensor:
        u, v = join(upper), join(lower)
        return v @ self.A @ v / 2 + u @ self.C @ v + self.a @ v

    def f_upper(self, at: Pair) -> Tensor:
        return self.B @ join(at.upper) + self.K @ join(at.lower) + self.s

    def f_lower(self, at: Pair) -> Tensor:
        return self.F @ join(at.lower) + self.K.T @ join(at.upper) + self.p

    def g_upper(self, at: Pair) -> Tensor:
        return self.C @ join(at.lower)

    def residual(self, at: Pair) -> Tensor:
        return self.A @ join(at.lower) + self.C.T @ join(at.upper) + self.a

    def solution(self, upper: Sequence[Tensor]) -> Tensors:
        v = -torch.linalg.solve(self.A, self.C.T @ join(upper) + self.a)
        return split(v, self.lower_shapes)

    def adjoint(self, at: Pair, damping: float = 0.0) -> Tensor:
        damped = self.A + damping * torch.eye(self.n_lower, dtype=torch.float64)
        return -torch.linalg.solve(damped, self.f_lower(at))

    def hypergradient(self, at: Pair, damping: float = 0.0) -> Tensor:
        """The implicit formula at any (u, v); the derivative of f(u, v*(u)) where v = v*(u)."""
        return self.f_upper(at) + self.C @ self.adjoint(at, damping)


EXACT = {"rtol": 1e-10, "atol": 1e-12}  # rounding of a few hundred float64 operations


def quadratic_pair() -> tuple[Quadratic, Pair, tuple[Tensor, ...]]:
    problem = Quadratic.random(seed=1)
    return problem, problem.point(), split(normal(7, seed=99), problem.lower_shapes)


# Problems that are solved for v at a fixed u.


class Oracle(NamedTuple):
    """Losses, a point with v = v*(u), and what differentiation must give there."""

    f: Callable[[Any, Any], Tensor]
    g: Callable[[Any, Any], Tensor]
    upper: Any
    lower: Any
    hypergradient: Any
    adjoint: Any


def quadratic() -> Oracle:
    problem = Quadratic.random(seed=3)
    upper = problem.point().upper
    at = Pair(upper, problem.solution(upper))
    return Oracle(
        problem.f,
        problem.g,
        *at,
        split(problem.hypergradient(at), problem.upper_shapes),
        split(problem.adjoint(at), problem.lower_shapes),
    )


def scalar_ridge(u: float = 0.3) -> Oracle:
    """g = (av - b)^2/2 + e^u v^2/2, f = (cv - d)^2/2 at (a, b, c, d) = (2, 3, 1.5, 1).

    v* = 6 / (4 + e^u); the bilevel solution is u = ln 5, v = 2/3, f = 0.
    """
    v = 6 / (4 + math.exp(u))
    q = 1.5 * (1.5 * v - 1) / (4 + math.exp(u))
    tensor = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    return Oracle(
        lambda u, v: (1.5 * v - 1) ** 2 / 2,
        lambda u, v: (2 * v - 3) ** 2 / 2 + u.exp() * v**2 / 2,
        tensor(u),
        tensor(v),
        tensor(-math.exp(u) * v * q),
        tensor(-q),
    )


def feature_ridge() -> Oracle:
    """g = |Xw - y|^2/2N + sum_j e^{u_j} w_j^2 / 2, f = |Zw - z|^2/2M; pytrees are dicts."""
    n, m, d = 12, 8, 5
    X, y, Z, z, u = (
        normal(n, d, seed=1),
        normal(n, seed=2),
        normal(m, d, seed=3),
        normal(m, seed=4),
        normal(d, seed=5),
    )
    hessian = X.T @ X / n + torch.diag(u.exp())
    w = torch.linalg.solve(hessian, X.T @ y / n)
    q = torch.linalg.solve(hessian, Z.T @ (Z @ w - z) / m)

    def f(upper: dict[str, Tensor], lower: dict[str, Tensor]) -> Tensor:
        return (Z @ lower["w"] - z).square().sum() / (2 * m)

    def g(upper: dict[str, Tensor], lower: dict[str, Tensor]) -> Tensor:
        fit = (X @ lower["w"] - y).square().sum() / (2 * n)
        return fit + (upper["log_decay"].exp() * lower["w"].square()).sum() / 2

    return Oracle(f, g, {"log_decay": u}, {"w": w}, {"log_decay": -u.exp() * w * q}, {"w": -q})


def weighted_cleaning() -> Oracle:
    """g = sum_i s(u_i) (x_i'v - y_i)^2 / 2N + rho |v|^2 / 2 with s the sigmoid; f on clean data."""
    n, m, d, rho = 15, 9, 4, 0.1
    X, y, Z, z, u = (
        normal(n, d, seed=11),
        normal(n, seed=12),
        normal(m, d, seed=13),
        normal(m, seed=14),
        normal(n, seed=15),
    )
    share = u.sigmoid()
    hessian = X.T @ (share[:, None] * X) / n + rho * torch.eye(d, dtype=torch.float64)
    v = torch.linalg.solve(hessian, X.T @ (share * y) / n)
    q = torch.linalg.solve(hessian, Z.T @ (Z @ v - z) / m)

    def f(upper: Tensor, lower: Tensor) -> Tensor:
        return (Z @ lower - z).square().sum() / (2 * m)

    def g(upper: Tensor, lower: Tensor) -> Tensor:
        fit = (upper.sigmoid() * (X @ lower - y).square()).sum() / (2 * n)
        return fit + rho * lower.square().sum() / 2

    exact = -share * (1 - share) * (X @ v - y) * (X @ q) / n
    return Oracle(f, g, u, v, exact, -q)


def minimax() -> Oracle:
    """g = -f, f = |u|^2/2 + u'Bv - mu |v - c|^2/2: v* = c + B'u/mu, df = u + Bv*, q = 0."""
    mu, B, c, u = 0.7, normal(3, 4, seed=21), normal(4, seed=22), normal(3, seed=23)
    v = c + B.T @ u / mu

    def f(upper: Tensor, lower: Tensor) -> Tensor:
        return upper @ upper / 2 + upper @ B @ lower - mu * (lower - c).square().sum() / 2

    return Oracle(f, lambda u, v: -f(u, v), u, v, u + B @ v, torch.zeros_like(v))


ORACLES: dict[str, Callable[[], Oracle]] = {
    "quadratic": quadratic,
    "scalar_ridge": scalar_ridge,
    "feature_ridge": feature_ridge,
    "weighted_cleaning": weighted_cleaning,
    "minimax": minimax,
}
