"""Engines of users: what they remember is saved and put back, and what they lack is named."""

import copy

import pytest
import torch

from torch_penalty_bilevel import HypergradientOptimizer, NonFiniteError, PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import DoubleBackward, FiniteDifference


class Counting(DoubleBackward):
    """Knows how many lower losses it has linearised."""

    name = "counting"

    def __init__(self):
        super().__init__()
        self.count = 0

    def linearise(self, loss, at, *, reusable=False):
        self.count += 1
        return super().linearise(loss, at, reusable=reusable)

    def packed(self):
        return {"count": self.count}

    def unpack(self, saved):
        self.count = saved["count"]


class Run:
    def __init__(self, kind, engine):
        self.u, self.v = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        self.optimizer = kind([self.u], [self.v], curvature=engine)

    def step(self, g=lambda value: value):
        self.optimizer.step(
            lambda: self.v.square().sum(), lambda: g((self.v - self.u).square().sum())
        )


KINDS = [PenaltyBilevelOptimizer, HypergradientOptimizer]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_an_engine_is_saved(kind):
    run = Run(kind, Counting())
    for _ in range(3):
        run.step()
    count = run.optimizer.curvature.count
    assert count >= 3
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = Run(kind, Counting())
    other.optimizer.load_state_dict(saved)
    assert other.optimizer.curvature.count == count
    for engine in (FiniteDifference(), "auto"):  # of another kind: its own way
        Run(kind, engine).optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_step_puts_it_back(kind):
    run = Run(kind, Counting())
    run.step()
    before, calls = run.optimizer.curvature.count, []

    def fails_late(value):
        calls.append(value)
        return value / 0 if len(calls) > 1 else value

    run.optimizer.lower_steps = 3
    with pytest.raises(NonFiniteError):
        run.step(fails_late)
    assert len(calls) > 1
    assert run.optimizer.curvature.count == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_engine_is_refused_with_the_remedy(kind):
    class Bare:
        name, product_cost = "bare", 1
        gradient = linearise = None

    with pytest.raises(TypeError, match=r"Bare lacks \['reads_live'.*subclass .*Curvature"):
        kind(
            [torch.ones(1, requires_grad=True)],
            [torch.ones(1, requires_grad=True)],
            curvature=Bare(),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_self_check_leaves_what_it_remembers(kind):
    run = Run(kind, Counting())
    run.step()
    before = run.optimizer.curvature.count
    f, g = lambda: run.v.square().sum(), lambda: (run.v - run.u).square().sum()
    run.optimizer.check_hypergradient(f, g)
    assert run.optimizer.curvature.count == before
