"""Bilevel problems whose answers are known, and small networks to differentiate twice.

Letters as in the package: u upper, v lower, f upper loss, g lower loss, r = grad_v g,
H = d2g/dv2, J = d2g/du dv (n_u x n_v), q = -H^{-1} grad_v f the adjoint.
Losses here are pure, ``loss(upper, lower)``; every problem brings its own random generator, so
nothing depends on the seed or the default dtype of the session.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# 1. The quadratic: everything in closed form, each level over two tensors of other shapes.


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


# 2, 3, 10 of the project's list, each solved for v at a fixed u.


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


# Small networks under per-sample weights and a weight decay, both upper.


class Mean(nn.Module):
    """Average over one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


class CustomCube(torch.autograd.Function):
    """x^3 with a right second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceCube(CustomCube):
    """x^3 whose second derivative torch drops."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 3))


def _transformer() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    return nn.Sequential(layer, Mean(1), nn.Linear(4, 3))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 4, 3)
    )


def _weight_norm() -> nn.Sequential:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))


_NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp_tanh": (lambda: _mlp(nn.Tanh()), (5,)),
    "mlp_gelu": (lambda: _mlp(nn.GELU()), (5,)),
    "mlp_relu": (lambda: _mlp(nn.ReLU()), (5,)),
    "cnn_groupnorm": (_cnn, (1, 4, 4)),
    "batchnorm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        (5,),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)),
        (5,),
    ),
    "transformer": (_transformer, (3, 4)),
    "weight_norm": (_weight_norm, (5,)),
    "custom_function": (lambda: _mlp(Apply(CustomCube.apply)), (5,)),
    "once_differentiable": (lambda: _mlp(Apply(OnceCube.apply)), (5,)),
}


@dataclass
class NetProblem:
    """g = mean_i sigmoid(u_i) CE_i + e^{w} |v|^2 / 2, with (u, w) upper and a network lower.

    ``closure`` reads the live module, ``pure`` is the same loss of its arguments.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    upper: Tensors
    forward: Callable[[Tensor], Tensor] | None = None

    @property
    def lower(self) -> Tensors:
        return tuple(self.net.parameters())

    @property
    def at(self) -> Pair:
        return Pair(self.upper, self.lower)

    def closure(self, upper: Any = None, lower: Any = None) -> Tensor:
        scores = (self.forward or self.net)(self.x)
        return self._loss(scores, self.upper, self.lower)

    def pure(self, upper: Tensors, lower: Tensors) -> Tensor:
        names = [name for name, _ in self.net.named_parameters()]
        parameters = dict(zip(names, lower, strict=True))
        return self._loss(torch.func.functional_call(self.net, parameters, self.x), upper, lower)

    def _loss(self, scores: Tensor, upper: Tensors, lower: Tensors) -> Tensor:
        each = F.cross_entropy(scores.to(self.x.dtype), self.y, reduction="none")
        decay = sum(v.square().sum() for v in lower)
        return (upper[0].sigmoid() * each).mean() + upper[1].exp() * decay / 2

    def direction(self, seed: int = 70) -> Tensors:
        generators = [normal(*p.shape, seed=seed + i) for i, p in enumerate(self.lower)]
        return tuple(t.to(p.dtype) for t, p in zip(generators, self.lower, strict=True))

    def cast(self, dtype: torch.dtype) -> NetProblem:
        """The same numbers rounded to ``dtype``."""
        net = copy.deepcopy(self.net).to(dtype)
        upper = leaves([u.to(dtype) for u in self.upper])
        return NetProblem(net, self.x.to(dtype), self.y, upper)


def net_problem(name: str, samples: int = 8) -> NetProblem:
    """A small float64 network in training mode on random data."""
    build, shape = _NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = build().double().train()
    x = normal(samples, *shape, seed=2)
    y = torch.randint(0, 3, (samples,), generator=generator(3))
    upper = leaves([normal(samples, seed=4), torch.tensor(-2.0, dtype=torch.float64)])
    return NetProblem(net, x, y, upper)


def exact_products(problem: NetProblem, direction: Tensors) -> Pair:
    """(J q, H q) from the full joint Hessian of a twin made of plain operations.

    Row by row: ``torch.func.hessian`` (forward over reverse) and ``jacrev`` of ``jacrev`` are wrong
    by 8 to 20 % for BatchNorm and LayerNorm in torch 2.13, against a central difference.
    """
    shapes = [t.shape for t in (*problem.upper, *problem.lower)]
    n = len(problem.upper)
    twin = NetProblem(_plain_twin(problem.net), problem.x, problem.y, problem.upper)

    def of_vector(point: Tensor) -> Tensor:
        parts = split(point, shapes)
        return twin.pure(parts[:n], parts[n:])

    point = join([t.detach() for t in (*problem.upper, *problem.lower)])
    upper_size = sum(u.numel() for u in problem.upper)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(of_vector, point)
    product = hessian[:, upper_size:] @ join(direction)
    parts = split(product, shapes)
    return Pair(parts[:n], parts[n:])


def _plain_twin(net: nn.Module) -> nn.Module:
    """The same function of the same parameters without what cannot be differentiated twice."""
    twin = copy.deepcopy(net)
    # In training mode BatchNorm computes the same without running statistics.
    torch.func.replace_all_batch_norm_modules_(twin)
    for module in twin.modules():
        if isinstance(module, Apply):
            module.function = lambda x: x**3
        if type(module).__name__ == "_WeightNorm":
            module.forward = lambda g, v: g * v / v.norm(dim=1, keepdim=True)
    return twin
