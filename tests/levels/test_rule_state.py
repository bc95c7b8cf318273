"""A rule's state is declared once, and followed everywhere: frozen, added, restarted, saved.

Letters: nu the multiplier, a = grad_v f + H nu, H the Hessian of g in v.
"""

import copy
from dataclasses import dataclass

import pytest
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.multipliers import (
    DIRECTION,
    MEMORY,
    POINT,
    ZEROS,
    DualState,
    MultiplierRule,
    along,
)
from torch_penalty_bilevel.tensors import Tensors, axpy, scale


@dataclass(frozen=True, eq=False)
class HeavyBallState(DualState):
    velocity: Tensors = along(ZEROS)
    largest: float = 0.0


class HeavyBall(MultiplierRule):
    """Velocity p <- p / 2 - a / 10, nu <- nu + p."""

    shares_evaluation = True

    def start(self, lower):
        return HeavyBallState.at(lower, damping=1.0)

    def adjoint(self, state, residual):
        return state.multiplier

    def lower_update(self, state, evaluation, norms):
        velocity = axpy(-0.1, evaluation.adjoint_residual, scale(state.velocity, 0.5))
        return evaluation.residual, state.but(
            velocity=velocity,
            multiplier=axpy(1.0, velocity, state.multiplier),
            largest=max(state.largest, norms.adjoint_residual),
            steps=state.steps + 1,
        )


H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


class Run:
    """f = |v|^2 / 2 + |w|^2 / 2, g = (v - u)'H(v - u) / 2 + |w - 2 u|^2 / 2; v and w apart."""

    def __init__(self):
        self.u, self.v, self.w = (torch.full((2,), x, requires_grad=True) for x in (1.0, 3.0, -1.0))
        lower = torch.optim.SGD([self.v, self.w], lr=0.3)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u], lower, upper_lr=0.01, penalty=Stationarity(HeavyBall()), allow_unused=True
        )

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.step(
                lambda: (self.v.square().sum() + self.w.square().sum()) / 2,
                lambda: (
                    (self.v - self.u) @ H @ (self.v - self.u) / 2
                    + (self.w - 2 * self.u).square().sum() / 2
                ),
            )
        return self

    @property
    def state(self):
        return self.optimizer._dual


def test_it_moves_as_its_twin_says():
    run = Run()
    nu, p = torch.zeros(2), torch.zeros(2)
    for _ in range(20):
        a = run.v.detach() + H @ nu
        p = p / 2 - a / 10
        nu = nu + p
        run.step()
        torch.testing.assert_close(run.state.velocity[0], p, rtol=0, atol=1e-14)
        torch.testing.assert_close(run.optimizer.adjoint[0], nu, rtol=0, atol=1e-14)


def test_it_waits_where_its_parameter_is_frozen():
    run = Run().step(5)
    held = run.state.velocity[0].clone(), run.state.multiplier[0].clone()
    run.v.requires_grad_(False)
    run.step(5)
    assert torch.equal(run.state.velocity[0], held[0])
    assert torch.equal(run.state.multiplier[0], held[1])
    run.v.requires_grad_(True)
    run.step()
    assert not torch.equal(run.state.velocity[0], held[0])


def test_it_has_room_for_an_added_group_and_returns_to_zero_with_a_new_lower_problem():
    run = Run().step(5)
    late = torch.ones(3, requires_grad=True)
    run.optimizer.add_param_group({"params": [late], "level": "lower"})
    assert torch.equal(run.state.velocity[2], torch.zeros(3))
    assert float(run.state.velocity[1].norm()) > 0
    run.optimizer.restart_lower()
    assert all(float(p.norm()) == 0 for p in run.state.velocity + run.state.multiplier)
    assert run.state.largest > 0


def test_it_is_saved_beside_the_moments_and_resumed_bit_by_bit():
    run, other = Run().step(5), Run()
    saved = copy.deepcopy(run.optimizer.state_dict())
    entry = saved["state"][saved["param_groups"][1]["params"][0]]
    assert torch.equal(entry["bilevel_velocity"], run.state.velocity[0])
    for mine, theirs in ((other.u, run.u), (other.v, run.v), (other.w, run.w)):
        mine.data.copy_(theirs)
    other.optimizer.load_state_dict(saved)
    assert other.state.largest == run.state.largest
    run.step(5), other.step(5)
    assert torch.equal(run.u, other.u)
    assert torch.equal(run.state.velocity[1], other.state.velocity[1])


def test_a_failed_step_puts_it_back():
    run = Run().step(5)
    before = run.state
    with pytest.raises(ZeroDivisionError):
        run.optimizer.step(lambda: run.v.sum(), lambda: 1 / 0)
    assert run.state is before


# The four ways in which an entry follows its parameter.


@dataclass(frozen=True, eq=False)
class Everything(DualState):
    direction: Tensors = along(DIRECTION)
    point: Tensors = along(POINT)
    memory: tuple = along(MEMORY)


def test_roles():
    v = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0])
    state = Everything.at(v)
    assert state.lists() == ("multiplier", "direction", "point", "memory")
    assert state.multiplier[0].dtype == state.direction[0].dtype == torch.float32
    assert state.point[0].dtype == torch.bfloat16
    assert torch.equal(state.point[1], v[1])
    assert state.point[1] is not v[1]
    assert state.memory == ({}, {})

    ones = tuple(torch.ones_like(t) for t in state.multiplier)
    moved = state.but(multiplier=ones, direction=ones, point=ones, memory=({"n": 1}, {"n": 2}))
    part = moved.only([False, True])
    assert [len(part._of(name)) for name in part.lists()] == [1, 1, 1, 1]
    assert moved.only([True, True]) is moved

    twos = part.but(**{name: (torch.full((1,), 2.0),) for name in ("multiplier", "direction")})
    whole = moved.merged(twos, [False, True], v)
    assert torch.equal(whole.multiplier[0], ones[0])
    assert torch.equal(whole.direction[1], torch.full((1,), 2.0))
    assert torch.equal(whole.point[0], v[0])  # of a frozen parameter: itself
    assert whole.memory == ({"n": 1}, {"n": 2})

    again = whole.restarted(v)
    assert float(again.multiplier[0].norm()) == 0
    assert torch.equal(again.direction[1], torch.full((1,), 2.0))
    assert torch.equal(again.point[1], v[1])
    assert again.memory == whole.memory

    longer = whole.extended((torch.tensor([7.0]),), at=1)
    assert torch.equal(longer.point[1], torch.tensor([7.0]))
    assert [float(t.norm()) for t in (longer.multiplier[1], longer.direction[1])] == [0, 0]
    assert longer.memory[1] == {}


def test_what_a_rule_does_not_say_has_a_harmless_default():
    rule = HeavyBall()
    state = rule.start((torch.zeros(2),))
    assert rule.shift(state) == 0.0  # nu solves the plain adjoint equation
    assert rule.curvature_bound(state) is None
    assert rule.for_maps() is rule
    assert rule.upper_update(state, None, None) is state
    assert rule.follow(state, None, None) is state
    assert not rule.probes(state)
