"""Parameters frozen in mid run stay where they are, at either level, and thaw."""

import pytest
import torch

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

KINDS = {
    "penalty": (PenaltyBilevelOptimizer, {}),
    "paper": (PenaltyBilevelOptimizer, {"penalty": "paper"}),
    "value": (PenaltyBilevelOptimizer, {"penalty": "value"}),
    "several lower steps": (PenaltyBilevelOptimizer, {"lower_steps": 3}),
    "functional": (PenaltyBilevelOptimizer, {"curvature": "functional"}),
    "differences": (PenaltyBilevelOptimizer, {"curvature": "finite_difference"}),
    "implicit": (HypergradientOptimizer, {}),
    "cold": (HypergradientOptimizer, {"warm_start": False, "lower_steps": 3}),
    "alternating": (HypergradientOptimizer, {"method": "alternating", "allow_unused": True}),
}
RULES = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


class Two:
    """f = sum |v_i - 1|^2 + .01 |u_i|^2, g = sum |u_i - v_i|^2, two tensors in each level."""

    def __init__(self, kind, rule="Adam", frozen=()):
        self.u = [torch.full((3,), 0.3, requires_grad=True) for _ in range(2)]
        self.v = [torch.zeros(3, requires_grad=True) for _ in range(2)]
        for level, index in frozen:
            self[level][index].requires_grad_(False)
        self.make, self.options = KINDS[kind]
        self.optimizer = self.make(RULES[rule](self.u), RULES[rule](self.v), **self.options)

    def __getitem__(self, level):
        return {"upper": self.u, "lower": self.v}[level]

    def f(self, u=None, v=None):
        u, v = u or self.u, v or self.v
        return sum((b - 1).square().sum() for b in v) + 0.01 * sum(a.square().sum() for a in u)

    def g(self, u=None, v=None):
        return sum((a - b).square().sum() for a, b in zip(u or self.u, v or self.v, strict=True))

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.f, self.g)
        return self


def moments(run, parameter):
    """What the rule remembers; the multiplier and its like have tests of their own."""
    held = run.optimizer.state[parameter].items()
    return {k: torch.as_tensor(x).clone() for k, x in held if not k.startswith("bilevel_")}


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_frozen_in_mid_run_stays_and_its_moments_too(kind, rule, level):
    run = Two(kind, rule).run(3)
    frozen = run[level][0].requires_grad_(False)
    other = run[level][1].detach().clone()
    before = frozen.clone()
    memory = moments(run, frozen)
    run.run(4)
    assert torch.equal(frozen, before)
    assert frozen.grad is None
    assert not torch.equal(run[level][1], other)
    after = moments(run, frozen)
    assert memory.keys() == after.keys()
    assert all(torch.equal(after[k], old) for k, old in memory.items())
    frozen.requires_grad_()
    run.run(1)
    assert not torch.equal(frozen, before)
    assert frozen.grad is not None


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("kind", ["penalty", "functional", "implicit"])
@pytest.mark.long
def test_after_a_thaw_the_solution_is_found(kind, level):
    """v = u = 1 / 1.01, whatever was frozen for a while."""
    run = Two(kind).run(50)
    run[level][0].requires_grad_(False)
    run.run(50)
    run[level][0].requires_grad_()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 700)
    for _ in range(700):
        run.run(1)
        schedule.step()
    for a in (*run.u, *run.v):
        torch.testing.assert_close(a.detach(), torch.full((3,), 1 / 1.01), atol=1e-3, rtol=0)


def test_the_tracker_of_a_thawed_parameter_starts_at_v():
    """Frozen at construction, loaded later: z is not the v of construction."""
    run = Two("value", frozen=[("lower", 0)]).run(3)
    with torch.no_grad():
        run.v[0].fill_(7.0)
    run.run(1)
    run.v[0].requires_grad_()
    seen = []
    run.optimizer.lower.register_step_pre_hook(lambda *_: seen.append(run.v[0].detach().clone()))
    run.run(1)
    assert torch.equal(seen[0], torch.full((3,), 7.0))  # the first step is that of z
    assert torch.equal(run.optimizer.adjoint[0], torch.zeros(3))  # gamma (v - z)


def test_a_cold_start_leaves_a_frozen_parameter_where_it_is():
    run = Two("cold").run(2)
    with torch.no_grad():
        run.v[0].fill_(7.0)
    run.v[0].requires_grad_(False)
    run.run(2)
    assert torch.equal(run.v[0], torch.full((3,), 7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_frozen_as_a_whole(kind):
    run = Two(kind).run(2)
    for a in run.u:
        a.requires_grad_(False)
    before, other = [a.clone() for a in run.u], run.v[0].detach().clone()
    run.run(2)
    assert all(torch.equal(a, b) for a, b in zip(run.u, before, strict=True))
    assert kind == "cold" or not torch.equal(run.v[0], other)
    for b in run.v:
        b.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of lower is frozen"):
        run.run(1)
