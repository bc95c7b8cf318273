"""A user's training loops, as mypy and pyright in their strict modes see them; not run."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import assert_type

from torch_penalty_bilevel import (
    BilevelError,
    HypergradientOptimizer,
    HypergradientReport,
    Metrics,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    ValueGap,
)
from torch_penalty_bilevel.constraints import Ball, Box, Inequality, Simplex
from torch_penalty_bilevel.nn import SampleWeights, WeightDecay
from torch_penalty_bilevel.plotting import plot_metrics, plot_report


def penalty_loop(model: nn.Module, x: Tensor, y: Tensor) -> list[Metrics]:
    u = torch.zeros(len(y), requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], model.parameters(), upper_lr=0.1, lower_lr=0.1)

    def f() -> Tensor:
        return cross_entropy(model(x), y)

    def g() -> Tensor:
        return (u.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean()

    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    history: list[Metrics] = []
    for _ in range(10):
        assert_type(optimizer.step(f, g), Tensor)
        history.append(optimizer.metrics)
        scheduler.step()
    optimizer.step(closure=f, lower_closure=g)
    optimizer.step((f, g))
    optimizer.step([f, f], [g, g])
    assert_type(optimizer.lower_step(f, g), Tensor)
    assert_type(optimizer.plain_lower_step(g), Tensor)
    assert_type(optimizer.upper_step(f, g), Tensor)
    assert_type(optimizer.metrics.as_dict(), dict[str, float])
    assert_type(optimizer.metrics.relative_certificate, Tensor)
    assert_type(optimizer.metrics.gradient_evaluations, int)
    assert_type(optimizer.adjoint, tuple[Tensor, ...])
    assert_type(optimizer.curvature.reason, str)
    assert_type(optimizer.curvature.name, str)
    assert_type(optimizer.upper, torch.optim.Optimizer)
    report = optimizer.check_hypergradient(f, g)
    assert_type(report, HypergradientReport)
    assert_type(report.agrees, bool)
    assert_type(report.cosine, float)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_type(plot_report(report), Figure)
    assert_type(plot_metrics(history), Figure)
    plot_metrics([metrics.as_dict() for metrics in history])
    return history


def ways_to_give_a_level(model: nn.Linear) -> None:
    u = nn.Parameter(torch.zeros(3))
    matrices, rest = [model.weight], [model.bias]
    PenaltyBilevelOptimizer([("u", u)], model.named_parameters())
    PenaltyBilevelOptimizer([{"params": [u], "lr": 0.1}], torch.optim.SGD(matrices, lr=0.1))
    PenaltyBilevelOptimizer(
        torch.optim.Adam([u]), [torch.optim.SGD(matrices), torch.optim.Adam(rest)]
    )
    PenaltyBilevelOptimizer([u], rest, penalty=ValueGap(weight=10.0), lower_steps="auto")
    PenaltyBilevelOptimizer([u], rest, penalty=Stationarity("paper"), reduce="mean")
    PenaltyBilevelOptimizer(
        [u], rest, upper_constraint=[Box(0.0, 1.0), Inequality(lambda: u.sum() - 1)]
    )
    PenaltyBilevelOptimizer([u], rest, upper_constraint=Simplex(), lower_constraint=Ball(1.0))


def hypergradient_loop(weights: SampleWeights, model: nn.Linear, x: Tensor, y: Tensor) -> float:
    decay = WeightDecay(model, per="tensor")
    upper = [*weights.parameters(), *decay.parameters()]
    optimizer = HypergradientOptimizer(
        upper, model.parameters(), method="cg_normal", lower_steps=lambda step: 1 + step
    )
    index = torch.arange(len(y))

    def f() -> Tensor:
        return cross_entropy(model(x), y)

    def g() -> Tensor:
        losses = cross_entropy(model(x), y, reduction="none")
        strength: Tensor = decay()  # what a module's call returns is Any
        return assert_type(weights.weighted_mean(losses, index), Tensor) + strength

    try:
        assert_type(optimizer.step(f, g), Tensor)
    except NonFiniteError as error:
        assert_type(error.page, str)
    except BilevelError as error:
        print(error.message())
    optimizer.restart_lower()
    assert_type(optimizer.metrics, Metrics)
    assert_type(optimizer.check_hypergradient(f, g), HypergradientReport)
    return float(optimizer.metrics.upper_loss)
