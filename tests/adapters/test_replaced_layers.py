"""Lower parameters that g does not use are named: at first, and when layers are replaced."""

import warnings

import pytest
import torch
from torch import nn

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer, PenaltyBilevelOptimizer

KINDS = [PenaltyBilevelOptimizer, HypergradientOptimizer]


class Net:
    def __init__(self, make, **options):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(32, 4), torch.randn(32, 1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.u = torch.zeros(32, requires_grad=True)
        self.spare = nn.Linear(2, 2)
        solver = {"method": "neumann", "step_size": 0.01, "inner_iterations": 2}
        self.make = make
        self.options = options | (solver if make is HypergradientOptimizer else {})

    def build(self, lower=None):
        lower = lower or self.net.named_parameters()
        self.optimizer = self.make(
            [self.u], lower, upper_lr=0.05, lower_lr=0.01, allow_unused=False, **self.options
        )
        return self

    def f(self):
        return (self.net(self.x[:8]) - self.y[:8]).square().mean()

    def g(self):
        return (self.u.sigmoid() * (self.net(self.x) - self.y).square().squeeze(1)).mean()

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.f, self.g)
        return self


ENGINES = ["double_backward", "finite_difference"]


@pytest.mark.parametrize("curvature", ENGINES)
@pytest.mark.parametrize("make", KINDS)
def test_a_part_that_is_not_used_is_named_once_at_the_start(make, curvature):
    run = Net(make, curvature=curvature)
    run.build([*run.net.named_parameters(), *run.spare.named_parameters("spare")])
    with pytest.warns(BilevelWarning, match=r"\['spare.weight', 'spare.bias'\]"):
        run.run(1)
    run.run(45)  # warnings are errors here


@pytest.mark.parametrize("curvature", ENGINES)
@pytest.mark.parametrize("make", KINDS)
def test_a_replaced_head_is_named_once(make, curvature):
    run = Net(make, curvature=curvature).build().run(3)
    run.net[2] = nn.Linear(8, 1)
    run.run(20)
    with pytest.warns(BilevelWarning, match=r"\['2.weight', '2.bias'\].*add_param_group"):
        run.run(1)
    run.run(25)


@pytest.mark.parametrize("make", KINDS)
def test_all_layers_replaced_is_an_error_that_blames_the_lower_level(make):
    run = Net(make).build().run(3)
    run.net[0], run.net[2] = nn.Linear(4, 8), nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"does not depend on any lower parameter.*replaced"):
        run.run(1)


@pytest.mark.parametrize("make", KINDS)
def test_a_group_added_later_is_looked_at(make):
    run = Net(make).build().run(2)
    run.optimizer.add_param_group(
        {"params": [("late", torch.zeros(2, requires_grad=True))], "level": "lower"}
    )
    with pytest.warns(BilevelWarning, match=r"\['late'\]"):
        run.run(1)
    run.optimizer.add_param_group(
        {"params": [("more", torch.zeros(2, requires_grad=True))], "level": "lower"}
    )
    with pytest.warns(BilevelWarning, match=r"\['more'\]"):
        run.run(1)


def test_dead_units_are_not_taken_for_missing_ones():
    run = Net(PenaltyBilevelOptimizer).build()
    with torch.no_grad():
        run.net[0].weight.zero_()
        run.net[0].bias.fill_(-1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*hypergradient was exactly zero")
        warnings.filterwarnings("error", message=".*lower loss does not depend")
        run.run(45)
