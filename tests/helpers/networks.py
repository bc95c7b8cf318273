"""Small networks to differentiate twice, under per-sample weights and a weight decay, both upper.

Letters and generators as in ``problems.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import Tensors, generator, join, leaves, normal, split
from torch import Tensor, nn
from torch.nn import functional as F

from torch_penalty_bilevel.tensors import Pair


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
