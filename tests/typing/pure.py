"""Pure functions and ``minimize``, as strict type checkers see a user's calls; not run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from torch_penalty_bilevel import MinimizeResult, functional, minimize
from torch_penalty_bilevel.constraints import NonNegative
from torch_penalty_bilevel.functional import HypergradientInfo, PenaltyGradient


def f(u: Tensor, v: Tensor) -> Tensor:
    return (v - 1).square().sum() + u.square().sum()


def g(u: Tensor, v: Tensor) -> Tensor:
    return (v - 2 * u).square().sum()


def tensors(u: Tensor, v: Tensor) -> Tensor:
    gradient = functional.penalty_gradient(f, g, u, v, weight=1.0, multiplier=v, damping=0.1)
    assert_type(gradient, PenaltyGradient)
    assert_type(gradient.upper_loss, Tensor)
    hypergradient, info = functional.hypergradient(f, g, u, v, method="cg", damping=0.1)
    assert_type(hypergradient, Tensor)
    assert_type(info, HypergradientInfo)
    assert_type(info.converged, bool)
    print(info.status == "converged", info.residual_norm)
    return hypergradient


def pytrees(model: nn.Module, x: Tensor) -> None:
    upper = {"decay": torch.zeros(1)}
    lower: dict[str, Tensor] = dict(model.named_parameters())

    def loss(u: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, v, (x,))
        return output.square().mean() + u["decay"].sum()

    functional.hypergradient(loss, loss, upper, lower, method="neumann", step_size=0.1)


def solved(u: Tensor, v: Tensor) -> float:
    result = minimize(f, g, u, v, upper_constraint=NonNegative(), restarts=2)
    assert_type(result, MinimizeResult)
    assert_type(result.converged, bool)
    assert_type(result.message, str)
    return float(result.upper_grad_norm)
