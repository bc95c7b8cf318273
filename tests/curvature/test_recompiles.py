"""Compiled code is compiled in the first steps and never again, whatever moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from torch_penalty_bilevel import PenaltyBilevelOptimizer

STEPS = 20


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def built(compiled: str, engine: str, backend: object) -> Callable[[], Tensor]:
    """One step on a fresh batch of sixteen, with rates that follow a cosine; it returns u."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    weights = nn.Parameter(torch.zeros(64))
    x, y = torch.randn(80, 5), torch.randint(0, 3, (80,))

    def f(model: Callable[..., Tensor]) -> Tensor:
        return cross_entropy(model(x[64:]), y[64:])

    def g(model: Callable[..., Tensor], rows: Tensor) -> Tensor:
        losses = cross_entropy(model(x[rows]), y[rows], reduction="none")
        return (weights[rows].sigmoid() * losses).mean()

    model: Callable[..., Tensor] = net
    if compiled == "module":
        model = torch.compile(net, backend=backend)
    else:
        f, g = (torch.compile(loss, backend=backend) for loss in (f, g))
    optimizer = PenaltyBilevelOptimizer(
        [weights], net.parameters(), upper_lr=0.1, lower_lr=0.01, curvature=engine
    )
    schedule = CosineAnnealingLR(optimizer, 2 * STEPS)

    def step() -> Tensor:
        rows = torch.randperm(64)[:16]
        optimizer.step(lambda: f(model), lambda: g(model, rows))
        schedule.step()
        return weights.detach().clone()

    return step


@pytest.mark.parametrize("engine", ["finite_difference", "auto"])
@pytest.mark.parametrize("compiled", ["module", "losses"])
def test_no_compilation_after_the_second_step(compiled: str, engine: str) -> None:
    """Probing and other steps, shifted v, another u, other rates, a look (step 10 of "auto")."""
    counter = CompileCounterWithBackend("eager")
    step = built(compiled, engine, counter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "switched to finite differences")
        step()
        first = step()
    before = counter.frame_count
    assert before == (1 if compiled == "module" else 2)
    with config.patch(error_on_recompile=True):
        last = [step() for _ in range(STEPS)][-1]
    assert counter.frame_count == before
    assert (last != first).sum() > 32
