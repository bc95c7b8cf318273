"""Memory is flat over a run: a step leaves behind what it replaced, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch
from memory import kept_bytes
from torch import nn
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

# The penalty's curvature probe comes once in 20 steps: whole periods compare like with like.
PERIOD = 20


def stepping(make, **options):
    """One step of cleaning 40 samples by a small network with BatchNorm and dropout."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)
    )
    u = torch.zeros(40, requires_grad=True)
    x, y = torch.randn(60, 6), torch.randint(0, 3, (60,))

    def g():
        losses = cross_entropy(model(x[:40]), y[:40], reduction="none")
        return (u.sigmoid() * losses).mean()

    optimizer = make([u], list(model.parameters()), upper_lr=1e-3, lower_lr=1e-3, **options)
    return lambda: optimizer.step(lambda: cross_entropy(model(x[40:]), y[40:]), g)


def live():
    """Tensors that Python holds, without those frozen, and the bytes behind them."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [
        (PenaltyBilevelOptimizer, {"curvature": "double_backward"}, 2000),
        (PenaltyBilevelOptimizer, {"curvature": "finite_difference"}, 2000),
        (PenaltyBilevelOptimizer, {"penalty": "value"}, 200),
        (PenaltyBilevelOptimizer, {"penalty": "paper", "lower_steps": 2}, 200),
        (HypergradientOptimizer, {"method": "cg", "damping": 10.0}, 200),
        (HypergradientOptimizer, {"method": "reverse", "lower_steps": 3}, 200),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_memory_is_flat(make, options, steps):
    gc.collect()
    gc.freeze()  # what other tests left
    step = stepping(make, **options)
    for _ in range(PERIOD):
        step()
    gc.collect()
    # Without the collector a reference cycle that holds tensors counts as what it is, a leak
    # until somebody happens to collect.
    gc.disable()
    try:
        before = live()
        for _ in range(steps):
            step()
        assert live() == before
        # The allocator also sees what only graphs hold, out of Python's sight.
        # A trace sees frees only of what some trace saw allocated: the first one is for that.
        _, kept = (kept_bytes(lambda: [step() for _ in range(PERIOD)]) for _ in range(2))
        assert kept == 0
    finally:
        gc.enable()
        gc.unfreeze()
