"""Closures that come in mid run are looked at as closely as the first ones.

With u, v in R^3, b = (1, 2, 3): f = |v - b|^2 / 2 + |u|^2 / 2, and a g whose minimiser is u / 1.5,
so that the solution is u = (b / 1.5) / (1 + 1 / 2.25).
"""

import copy

import pytest
import torch
from choosing import Task, normalised
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import (
    BilevelWarning,
    DoubleBackwardError,
    HypergradientOptimizer,
    NondeterministicClosureError,
    PenaltyBilevelOptimizer,
)

B = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
SOLUTION = (B / 1.5) / (1 + 1 / 2.25)


class Run:
    def __init__(self, kind, **options):
        self.u, self.v = torch.zeros(3, requires_grad=True), torch.full((3,), 0.5).requires_grad_()
        rules = torch.optim.SGD([self.u], lr=0.05), torch.optim.SGD([self.v], lr=0.3)
        self.optimizer = kind(*rules, **options)

    def steps(self, count, g):
        for _ in range(count):
            self.optimizer.step(
                lambda: ((self.v - B).square().sum() + self.u.square().sum()) / 2, g
            )

    def plain(self):
        return (self.v - self.u).square().sum() / 2

    def hiding(self):
        """Its gradient is 1.5 v - u, and half of how that depends on v is hidden."""
        return self.plain() + (self.v.detach() * 0.5 * self.v).sum()


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_auto_sees_that_a_new_loss_hides_its_curvature(kind):
    run = Run(kind)
    run.steps(20, run.plain)
    assert run.optimizer.curvature.current.name == "double_backward"
    with pytest.warns(BilevelWarning, match="differ by .* from autograd's second derivative"):
        run.steps(400, run.hiding)
    torch.testing.assert_close(run.u.detach(), SOLUTION, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_double_backward_refuses_a_new_graph_that_it_would_get_wrong(kind):
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(3, 1))
    run = Run(kind, curvature="double_backward")
    run.steps(3, run.plain)
    before = run.u.detach().clone(), run.v.detach().clone()

    def normed():
        return run.plain() + layer(run.v).square().sum()

    with pytest.raises(DoubleBackwardError, match="weight_norm is silently wrong"):
        run.steps(1, normed)
    assert torch.equal(run.u, before[0])
    assert torch.equal(run.v, before[1])


class Vouchless(torch.autograd.Function):
    """x^2 with a second derivative, which torch cannot know to be right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def test_auto_looks_through_a_new_graph_before_it_trusts_it():
    run = Run(PenaltyBilevelOptimizer)
    run.steps(3, run.plain)
    assert not run.optimizer.curvature.switched
    with pytest.warns(BilevelWarning, match="nothing vouches for .*Vouchless"):
        run.steps(1, lambda: Vouchless.apply(run.v - run.u).sum() / 2)
    assert run.optimizer.curvature.switched


class Drawing:
    """Classifies a new batch in every call; with zero weights the loss is log 2 on each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 3, generator=generator)
        self.y = torch.randint(2, (40,), generator=generator)
        self.scores = torch.zeros(40, requires_grad=True)
        self.weights = torch.zeros(2, 3, requires_grad=True)
        self.calls = 0

    def loss(self, rows):
        losses = F.cross_entropy(self.x[rows] @ self.weights.T, self.y[rows], reduction="none")
        return (2 * self.scores[rows].sigmoid() * losses).mean()

    def drawn(self):
        self.calls += 1
        return self.loss(torch.arange(10) + 10 * (self.calls % 4))

    def whole(self):
        return self.loss(torch.arange(40))

    def f(self):
        return F.cross_entropy(self.x @ self.weights.T, self.y)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{"curvature": "finite_difference"}, {"penalty": "value"}])
def test_a_closure_that_draws_is_seen_though_its_loss_repeats(options, late):
    task = Drawing()
    lower = torch.optim.SGD([task.weights], lr=0.1 if late else 0.0)
    optimizer = PenaltyBilevelOptimizer([task.scores], lower, **options)
    for _ in range(3 * late):
        optimizer.step(task.f, task.whole)
    before = task.weights.detach().clone()
    with pytest.raises(NondeterministicClosureError):
        optimizer.step(task.f, task.drawn)
    assert torch.equal(task.weights, before)


def test_a_resumed_run_looks_at_the_engines_when_the_first_would_have():
    """Past the next look, on a network that "auto" takes by differences."""
    first = Task(normalised())
    first.run(30)
    assert first.optimizer.curvature.switched
    saved = copy.deepcopy(first.optimizer.state_dict())
    other = Task(normalised())
    other.net.load_state_dict(first.net.state_dict())
    with torch.no_grad():
        other.scores.copy_(first.scores)
    other.optimizer.load_state_dict(saved)
    first.run(45)
    other.run(45)
    assert first.optimizer.curvature.packed() == other.optimizer.curvature.packed()
    assert torch.equal(first.scores, other.scores)
