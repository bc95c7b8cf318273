"""Lower tensors that no loss uses in an evaluation: left alone, with their moments, as in torch."""

import pytest
import torch

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:the lower loss does not depend on")
ENGINES = ["double_backward", "finite_difference", "functional", "auto"]
RULES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


class Heads:
    """Two heads on one body: which of them is used is drawn by the step."""

    def __init__(self, rule="SGD", make=PenaltyBilevelOptimizer, **options):
        self.u = torch.full((3,), 0.3, requires_grad=True)
        self.body, *self.heads = (torch.full((3,), s, requires_grad=True) for s in (0.1, 0.5, -0.4))
        self.used = 0
        lower = RULES[rule]([self.body, *self.heads])
        self.optimizer = make([self.u], lower, upper_lr=0.01, **options)

    def f(self, upper=None, lower=None):
        body, *heads = lower or (self.body, *self.heads)
        (u,) = upper or (self.u,)
        return (body + heads[self.used] - 1).square().sum() + 0.1 * u.square().sum()

    def g(self, upper=None, lower=None):
        body, *heads = lower or (self.body, *self.heads)
        (u,) = upper or (self.u,)
        return (body - u).square().sum() + (heads[self.used] - 2 * u).square().sum()

    def run(self, heads):
        for self.used in heads:
            self.optimizer.step(self.f, self.g)
        return self


MAKERS = [
    *((PenaltyBilevelOptimizer, {"curvature": engine}) for engine in ENGINES),
    (PenaltyBilevelOptimizer, {"lower_steps": 2}),
    (PenaltyBilevelOptimizer, {"penalty": "value"}),
    (PenaltyBilevelOptimizer, {"penalty": "paper"}),
    *((HypergradientOptimizer, {"curvature": engine, "damping": 0.1}) for engine in ENGINES),
]


def moments(run, parameter):
    """What the rule remembers, without the multiplier and its like."""
    held = run.optimizer.state[parameter].items()
    return {k: x.clone() for k, x in held if not k.startswith("bilevel_")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("make", "options"), MAKERS)
def test_a_head_that_is_not_used_stays_with_its_moments(make, options, rule):
    run = Heads(rule, make, **options).run([0, 1, 0])
    for head, used in ((0, 1), (1, 0)):
        absent = run.heads[head]
        before = absent.detach().clone()
        memory = moments(run, absent)
        assert memory
        run.run([used] * 3)
        assert torch.equal(absent, before)
        assert absent.grad is None
        assert all(torch.equal(moments(run, absent)[k], x) for k, x in memory.items())
        run.run([head])
        assert not torch.equal(absent, before)


def test_a_head_moves_as_under_a_rule_that_steps_when_it_is_used():
    """SGD with momentum on the very gradients, for each head one that sees only its own steps."""
    run = Heads()
    twins = [h.detach().clone().requires_grad_() for h in run.heads]
    rules = [torch.optim.SGD([t], lr=0.01, momentum=0.9) for t in twins]
    for used in (0, 1, 1, 0, 1, 0, 0):
        run.run([used])
        twins[used].grad = run.heads[used].grad.clone()
        rules[used].step()
        for head, twin in zip(run.heads, twins, strict=True):
            torch.testing.assert_close(head.detach(), twin.detach(), rtol=1e-14, atol=0)


def test_the_tracker_of_a_head_that_is_not_used_stays():
    run = Heads(penalty="value").run([0, 1, 0, 0])
    kept = run.optimizer._own_state()
    z, buffer = kept["tracker"][2].clone(), kept["moments"][2]["momentum_buffer"].clone()
    run.run([0, 0])
    after = run.optimizer._own_state()
    assert torch.equal(after["tracker"][2], z)
    assert torch.equal(after["moments"][2]["momentum_buffer"], buffer)
    assert not torch.equal(after["tracker"][1], kept["tracker"][1])
