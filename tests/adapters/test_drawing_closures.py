"""Closures that draw: what a step returns is what it saw, and each is called once."""

import pytest
import torch
from constrained import leaf

from torch_penalty_bilevel import NondeterministicClosureError, PenaltyBilevelOptimizer, minimize
from torch_penalty_bilevel.constraints import Inequality

ENGINES = ["auto", "double_backward", "finite_difference", "functional"]


class Drawn:
    """f, g and h with noise of their own, in live or pure form; keeps what each returned."""

    def __init__(self, curvature, noise=0.3):
        self.u, self.v = leaf([3.0, 2.0]), leaf([0.5, -0.5])
        self.pure, self.noise = curvature == "functional", noise
        self.f_seen, self.h_seen = [], []

    def point(self, levels):
        return [level[0] for level in levels] if self.pure else (self.u, self.v)

    def f(self, *levels):
        u, v = self.point(levels)
        value = (v - 2 + self.noise * torch.randn(2, dtype=v.dtype)).square().sum() + 0.1 * u.sum()
        self.f_seen.append(float(torch.func.debug_unwrap(value.detach(), recurse=True)))
        return value

    def g(self, *levels):
        u, v = self.point(levels)
        return (v - u + self.noise * torch.randn(2, dtype=v.dtype)).square().sum() / 2

    def h(self, *levels):
        u, _ = self.point(levels)
        value = u - 1 + self.noise * torch.randn(2, dtype=u.dtype)
        self.h_seen.append(torch.func.debug_unwrap(value.detach(), recurse=True))
        return value


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
@pytest.mark.parametrize("curvature", ENGINES)
def test_what_an_upper_inequality_drew_counts(curvature, penalty, lower_steps):
    """f comes back as it was evaluated; mu follows the h that the gradient saw."""
    torch.manual_seed(0)
    drawn = Drawn(curvature)
    options = {"curvature": curvature, "penalty": penalty, "lower_steps": lower_steps}
    bound = Inequality(drawn.h, weight=2.0, rate=0.25)
    rates = {"upper_lr": 0.01, "lower_lr": 0.01}
    optimizer = PenaltyBilevelOptimizer(
        [drawn.u], [drawn.v], upper_constraint=bound, **rates, **options
    )
    mu = torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        drawn.h_seen.clear()
        assert float(optimizer.step(drawn.f, drawn.g)) == drawn.f_seen[-1]
        mu = mu + 0.25 * ((mu + 2.0 * drawn.h_seen[-1]).clamp(min=0) - mu)
        torch.testing.assert_close(optimizer.inequality_multipliers["upper"][0], mu)
        if step > 0:
            assert len(drawn.h_seen) == lower_steps + (penalty == "paper")


def test_a_huge_multiplier_term_leaves_f_its_digits():
    """f is what its closure returned, not a difference of large float32 numbers."""
    u, v = leaf([1e4], torch.float32), leaf([0.1], torch.float32)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_constraint=Inequality(lambda: u - 1))
    loss = optimizer.step(lambda: 0.001 + 0 * (u + v).sum(), lambda: (u * v).square().sum())
    assert float(loss) == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize("curvature", ENGINES)
def test_a_lower_inequality_is_called_once_with_each_lower_loss(curvature):
    torch.manual_seed(0)
    drawn, calls = Drawn(curvature), []

    def g(*levels):
        calls.append("g")
        return drawn.g(*levels)

    def h(*levels):
        calls.append("h")
        return -drawn.point(levels)[1] + 0.1 * torch.randn(2, dtype=torch.float64)

    optimizer = PenaltyBilevelOptimizer(
        [drawn.u], [drawn.v], curvature=curvature, lower_constraint=Inequality(h)
    )
    optimizer.step(drawn.f, g)
    calls.clear()
    for _ in range(3):
        optimizer.step(drawn.f, g)
    assert calls == ["g", "h"] * (len(calls) // 2)


def test_minimize_refuses_what_draws():
    start = leaf([0.0, 0.0]).detach()

    def loss(u, v):
        return (v - 1).square().sum() + u.square().sum()

    def lower(u, v):
        return (v - 2 * u).square().sum()

    def drawing(function):
        return lambda u, v: function(u, v) + 0.1 * torch.randn(())

    for name, args, bound in (
        ("upper_loss", (drawing(loss), lower), None),
        ("lower_loss", (loss, drawing(lower)), None),
        ("upper_constraint's", (loss, lower), Inequality(drawing(lambda u, v: u - 1))),
    ):
        with pytest.raises(NondeterministicClosureError, match=f"{name}.*draw the data outside"):
            minimize(*args, start, start, upper_constraint=bound)


@pytest.mark.parametrize("curvature", ["auto", "double_backward"])
def test_an_upper_parameter_of_f_alone_is_fine_beside_batches(curvature):
    """Where r's graph lacks a parameter a difference is asked; of other data it says nothing."""
    u, bias, v = leaf([3.0, 2.0]), leaf([1.0]), leaf([0.5, -0.5])
    batches = iter(torch.arange(1.0, 100.0, dtype=torch.float64))
    optimizer = PenaltyBilevelOptimizer([u, bias], [v], curvature=curvature)
    for _ in range(2):
        optimizer.step(
            lambda: (v.sum() - bias).square().sum(),
            lambda: next(batches) * (v - u).square().sum(),
        )
    assert bias.grad is not None
    assert bool(bias.grad.any())
