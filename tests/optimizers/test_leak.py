"""Memory is flat over a run: a step leaves behind what it replaced, and nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from classifying import classification, network
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from examples.shared.memory import kept_bytes
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

# The penalty's curvature probe comes once in 20 steps, and its correction rests and is tried again
# in turns of 100: whole periods compare like with like.
PROBING, RESTING = 20, 100


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "options", "period"),
    [
        (PenaltyBilevelOptimizer, {"curvature": "double_backward"}, RESTING),
        (PenaltyBilevelOptimizer, {"curvature": "finite_difference"}, RESTING),
        (PenaltyBilevelOptimizer, {"penalty": "value"}, PROBING),
        (PenaltyBilevelOptimizer, {"penalty": "paper", "lower_steps": 2}, PROBING),
        (HypergradientOptimizer, {"method": "cg", "damping": 10.0}, PROBING),
        (HypergradientOptimizer, {"method": "reverse", "lower_steps": 3}, PROBING),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_memory_is_flat(make, options, period):
    gc.collect()
    gc.freeze()  # what other tests left
    step = stepping(make, **options)
    for _ in range(period):
        step()
    gc.collect()
    # Without the collector a reference cycle that holds tensors counts as what it is, a leak
    # until somebody happens to collect.
    gc.disable()
    try:
        before = live()
        for _ in range(max(PROBING * 5, period)):
            step()
        assert live() == before
        # The allocator also sees what only graphs hold, out of Python's sight.
        # A trace sees frees only of what some trace saw allocated: the first one is for that.
        _, kept = (kept_bytes(lambda: [step() for _ in range(period)]) for _ in range(2))
        assert kept == 0
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("curvature", ["auto", "finite_difference", "functional"])
def test_graphs_die_with_their_step(curvature):
    """Without the garbage collector: a reference cycle would hold a graph per step."""
    x, y = classification()
    net = network()
    u = torch.zeros(24, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), curvature=curvature)
    alive = []

    def keep(loss):
        alive.append(weakref.ref(loss))
        return loss

    if curvature == "functional":
        names = [n for n, _ in net.named_parameters()]

        def logits(lower):
            return torch.func.functional_call(net, dict(zip(names, lower, strict=True)), (x,))

        pair = (
            lambda upper, lower: keep(F.cross_entropy(logits(lower), y)),
            lambda upper, lower: keep(
                (upper[0].exp() * F.cross_entropy(logits(lower), y, reduction="none")).mean()
            ),
        )
    else:
        pair = (
            lambda: keep(F.cross_entropy(net(x), y)),
            lambda: keep((u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()),
        )
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            optimizer.step(*pair)
        assert alive
        assert not [ref for ref in alive if ref() is not None and ref().grad_fn is not None]
        assert all(p.grad.grad_fn is None for p in (u, *net.parameters()))
    finally:
        gc.enable()


def test_memory_of_state_is_two_copies_of_the_lower_level():
    """The multiplier and the curvature probe; nothing grows with the steps."""
    net = network()
    x, y = classification()
    u = torch.zeros(24, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), lower_steps=3)
    sizes = []
    for _ in range(3):
        optimizer.step(
            lambda: F.cross_entropy(net(x), y),
            lambda: (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean(),
        )
        own = optimizer._own_state()
        tensors = [*own["multiplier"], *own["probe"], *own["adjoint"]]
        sizes.append(sum({t.data_ptr(): t.numel() for t in tensors}.values()))
    assert sizes == [2 * sum(p.numel() for p in net.parameters())] * 3
