"""check_hypergradient moves nothing, also where a closure raises."""

import contextlib
import copy
import math
import random

import pytest
import torch
from checking import names
from problems import normal
from tasks import Task, assert_unchanged, everything, noisy_task
from torch import nn

from torch_penalty_bilevel import PenaltyBilevelOptimizer


@pytest.mark.parametrize("curvature", ["auto", "double_backward", "finite_difference"])
@pytest.mark.parametrize("resolve", [True, False])
@pytest.mark.long
def test_nothing_moves(curvature, resolve):
    """Parameters, gradients, buffers, generators, state, metrics, and the next step: bit-equal."""
    task = noisy_task(curvature=curvature).run(3)
    before = everything(task)
    gradients = [None if p.grad is None else p.grad.clone() for p in task.net.parameters()]
    held = [p.grad for p in task.net.parameters()]
    metrics = task.optimizer.metrics

    def drawing():
        random.random()
        return task.lower()

    report = task.optimizer.check_hypergradient(task.upper, drawing, resolve=resolve)
    assert bool(report.slopes) == resolve
    assert "random" in names(report)  # dropout
    assert report.repeats == "with the same random numbers"
    assert_unchanged(before, task)
    assert str(task.optimizer.metrics) == str(metrics)
    for p, same, value in zip(task.net.parameters(), held, gradients, strict=True):
        assert p.grad is same
        assert value is None or torch.equal(p.grad, value)
    after = task.run(2).point()
    assert torch.equal(after, noisy_task(curvature=curvature).run(5).point())


@pytest.mark.parametrize("cold", [True, False])
def test_nothing_moves_when_a_closure_raises_at_any_call(cold):
    reference = noisy_task(curvature="auto")
    for fatal in [*range(1, 15), 20, 40, 80]:
        task = reference if cold else noisy_task(curvature="auto").run(2)
        before, calls = everything(task), 0

        def trap(closure, fatal=fatal):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise KeyError("stop")
            return closure()

        with pytest.raises(KeyError):
            task.optimizer.check_hypergradient(
                lambda trap=trap, task=task: trap(task.upper),
                lambda trap=trap, task=task: trap(task.lower),
            )
        assert_unchanged(before, task)


def test_engine_is_left_as_it_was():
    """A switch to finite differences happens in a copy, and without a warning."""
    task = Task()
    scale = torch.ones((), requires_grad=True)

    def lower():
        return task.lower() + Once.apply(task.net[0].weight * scale).sum()

    report = task.optimizer.check_hypergradient(task.upper, lower)
    assert report.engine == "finite_difference"
    assert math.isnan(report.engine_difference)
    assert not task.optimizer.curvature.switched


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_functional_mode_moves_nothing_and_takes_names():
    task = Task()
    optimizer = PenaltyBilevelOptimizer(
        [("w", task.weights)], task.net.named_parameters(), curvature="functional"
    )

    def f(upper, lower):
        return (
            (torch.func.functional_call(task.net, lower, task.x[8:]) - task.y[8:]).square().mean()
        )

    def g(upper, lower):
        out = torch.func.functional_call(task.net, lower, task.x[:8])
        each = (out - task.y[:8]).square().squeeze(1)
        return (upper["w"].sigmoid() * each).mean() + 0.05 * sum(
            v.square().sum() for v in lower.values()
        )

    for _ in range(5):
        optimizer.step(f, g)
    before, state = task.point(), torch.get_rng_state()
    report = optimizer.check_hypergradient(f, g, damping=0.1)
    assert torch.equal(task.point(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.slopes
    assert report.engine == "functional"
    assert report.engine_difference < 1e-6


@pytest.mark.parametrize("fails", [False, True])
def test_batch_norm_behind_pure_functions_equals_the_live_module(fails):
    """Buffers move once per step and never in a check, also where it raises."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    twin = copy.deepcopy(net)
    x, y = normal(8, 3, seed=1), normal(8, 1, seed=2)
    w, w2 = torch.zeros(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    pure = PenaltyBilevelOptimizer(
        [("w", w)], net.named_parameters(), curvature="functional", upper_lr=0.1
    )
    live = PenaltyBilevelOptimizer([w2], twin.parameters(), upper_lr=0.1)

    def losses(out, weights, parameters):
        decay = 0.5 * sum(p.square().sum() for p in parameters)
        return (weights.sigmoid() * (out - y).square().squeeze(1)).mean() + decay

    def f(upper, lower):
        return (torch.func.functional_call(net, lower, x) - 1).square().mean()

    def g(upper, lower):
        return losses(torch.func.functional_call(net, lower, x), upper["w"], lower.values())

    def live_f():
        return (twin(x) - 1).square().mean()

    def live_g():
        return losses(twin(x), w2, twin.parameters())

    for _ in range(3):
        pure.step(f, g)
        live.step(live_f, live_g)
    buffers = [b.clone() for b in net.buffers()]
    calls = []

    def trapped(upper, lower):
        calls.append(1)
        if fails and len(calls) == 5:
            raise KeyError("stop")
        return g(upper, lower)

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        report = pure.check_hypergradient(f, trapped)
        other = live.check_hypergradient(live_f, live_g)
        torch.testing.assert_close(report.exact, other.exact, rtol=1e-9, atol=1e-12)
    for before, after, here in zip(buffers, net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(before, after)
        torch.testing.assert_close(after, here, rtol=1e-12, atol=1e-12)
