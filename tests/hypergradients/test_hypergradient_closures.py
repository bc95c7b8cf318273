"""Closures that draw and modules with buffers: what each method repeats, draws anew, keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypergradient_runs import Run
from problems import normal
from torch import Tensor, nn
from torch.testing import assert_close

from examples.shared.memory import peak_bytes
from torch_penalty_bilevel import HypergradientOptimizer, NondeterministicClosureError


class Noisy:
    """A network with dropout on batches drawn by torch's generator."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.X, self.y = torch.randn(40, 3), torch.randn(40, 1)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
        self.u = torch.tensor(-1.0, requires_grad=True)
        self.rule = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.optimizer = HypergradientOptimizer([self.u], self.rule, upper_lr=0.0, **options)

    def f(self) -> Tensor:
        return self.net(self.X[:5]).square().sum()

    def g(self) -> Tensor:
        rows = torch.randint(0, 40, (8,))
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.net(self.X[rows]) - self.y[rows]).square().mean() + self.u.exp() * decay


def test_reverse_repeats_batches_and_dropout_masks() -> None:
    """Autograd through the same steps with the same draws."""
    noisy = Noisy(method="reverse", lower_steps=4)
    noisy.optimizer._dependence.due = False  # it draws nothing, but keep the draws simple
    state, start = torch.get_rng_state(), copy.deepcopy(noisy.net.state_dict())
    noisy.optimizer.step(noisy.f, noisy.g)
    reached = [p.detach().clone() for p in noisy.net.parameters()]

    noisy.net.load_state_dict(start)
    torch.set_rng_state(state)
    names = [name for name, _ in noisy.net.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in noisy.net.parameters()]

    def called(x: Tensor) -> Tensor:
        return torch.func.functional_call(noisy.net, dict(zip(names, values, strict=True)), (x,))

    for _ in range(4):
        rows = torch.randint(0, 40, (8,))
        fit = (called(noisy.X[rows]) - noisy.y[rows]).square().mean()
        loss = fit + noisy.u.exp() * sum(p.square().sum() for p in values)
        slopes = torch.autograd.grad(loss, values, create_graph=True)
        values = [v - 0.1 * s for v, s in zip(values, slopes, strict=True)]
    for mine, other in zip(reached, values, strict=True):
        assert_close(mine, other.detach(), rtol=1e-12, atol=1e-14)
    loss = called(noisy.X[:5]).square().sum()
    (expected,) = torch.autograd.grad(loss, noisy.u)
    assert_close(noisy.u.grad, expected, rtol=1e-10, atol=1e-13)


def test_reverse_refuses_data_it_cannot_repeat() -> None:
    rows = iter(normal(100, 4, seed=1))
    run = Run(method="reverse", lower_steps=3)
    before = run.v.detach().clone()
    closure = lambda: run.problem.g(run.u, run.v) + next(rows) @ run.v  # noqa: E731
    with pytest.raises(NondeterministicClosureError, match="repeats"):
        run.optimizer.step(run.closures[0], closure)
    assert torch.equal(run.v.detach(), before)


def test_reverse_refuses_steps_that_are_not_plain() -> None:
    run = Run(method="reverse", lower_steps=2, momentum=0.9)
    with pytest.raises(ValueError, match="without momentum"):
        run.step()
    run = Run(method="reverse", lower_steps=2)
    clip = lambda *_: nn.utils.clip_grad_norm_([run.v], 1e-3) and None  # noqa: E731
    run.optimizer.lower.register_step_pre_hook(clip)
    with pytest.raises(ValueError, match="hooks"):
        run.step()
    u, v = torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)
    assert isinstance(HypergradientOptimizer([u], [v], method="reverse").lower, torch.optim.SGD)
    assert isinstance(HypergradientOptimizer([u], [v]).lower, torch.optim.Adam)


def test_memory_of_reverse_is_that_of_the_iterates() -> None:
    v = normal(20, seed=1).requires_grad_()
    u = torch.tensor(0.3, requires_grad=True)
    grid = torch.linspace(0, 1, 2000)[:, None]

    def run(steps: int) -> None:
        rule = torch.optim.SGD([v], lr=0.01)
        optimizer = HypergradientOptimizer(
            [u], rule, upper_lr=0.0, method="reverse", lower_steps=steps
        )
        optimizer._dependence.due = False
        optimizer._scope.knows = lambda *functions: True  # no search beside the steps
        optimizer.step(lambda: v.square().sum(), lambda: torch.tanh(grid * v + u).square().mean())

    run(2)
    # With fewer than ten steps the peak lies elsewhere, in f's evaluation.
    few, many = peak_bytes(lambda: run(10)), peak_bytes(lambda: run(30))
    iterate, activation = 20 * 8, 2000 * 20 * 8
    assert few > 2 * activation
    # Per step an iterate, a 0-d loss and the state of torch's generator (about 5 kB).
    generator = torch.get_rng_state().numel()
    assert many - few <= 20 * (iterate + generator + 256)
    assert 20 * (iterate + generator + 256) < activation


@pytest.mark.parametrize("method", ["cg", "reverse", "stochastic"])
def test_batch_norm_moves_once_per_step(method: str) -> None:
    torch.manual_seed(0)
    X = torch.randn(16, 3) + 1
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    u = torch.tensor(0.0, requires_grad=True)
    rule = torch.optim.SGD(net.parameters(), lr=0.01)
    options = {} if method == "reverse" else {"damping": 1.0, "inner_iterations": 3}
    optimizer = HypergradientOptimizer([u], rule, method=method, lower_steps=3, **options)
    fresh = copy.deepcopy(net)
    fresh(X)  # what one forward pass does

    def g() -> Tensor:
        return net(X).square().mean() + u.exp() * sum(p.square().sum() for p in net.parameters())

    optimizer.step(lambda: (net(X) - 1).square().mean(), g)
    assert_close(net[1].running_mean, fresh[1].running_mean)
    assert int(net[1].num_batches_tracked) == 1
