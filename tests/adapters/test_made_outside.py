"""Tensors computed outside of the closures: refused as soon as what they come from has moved."""

import copy

import pytest
import torch
from tasks import Task
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from torch_penalty_bilevel import (
    DoubleBackwardError,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
)
from torch_penalty_bilevel.adapters.made_outside import MadeOutside

OLD = "computed outside of the closure"
EXACT = {"curvature": "double_backward"}
MAKERS = [
    (PenaltyBilevelOptimizer, {"curvature": "auto"}),
    (PenaltyBilevelOptimizer, EXACT),
    (PenaltyBilevelOptimizer, {"lower_steps": 3}),
    (PenaltyBilevelOptimizer, {"penalty": "paper"}),
]
# These go back through one graph twice in a step, of which torch complains.
TWICE = [
    (PenaltyBilevelOptimizer, {"curvature": "finite_difference"}),
    (PenaltyBilevelOptimizer, {"penalty": "value"}),
    (HypergradientOptimizer, {"method": "cg", "damping": 5.0, **EXACT}),
    (HypergradientOptimizer, {"method": "one_step", **EXACT}),
]


class Weighted(Task):
    """g weighs its samples by whatever ``w`` returns."""

    def __init__(self, kind=PenaltyBilevelOptimizer, **options):
        super().__init__()
        named = [("weights", self.weights)], self.net.named_parameters()
        self.optimizer = kind(*named, upper_lr=0.05, lower_lr=0.02, **options)
        self.w = self.weights.sigmoid

    def lower(self):
        losses = (self.net(self.x[:8]) - self.y[:8]).square().squeeze(1)
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.w() * losses).mean() + 0.01 * decay


def refused(task, match=f"lower_closure.*{OLD}.*from parameter 'weights'", error=ValueError):
    """The step that is refused, the first in which u is not where it began, moves nothing."""
    start = task.weights.detach().clone()
    for _ in range(3):  # q may be 0 in the first, and u stay
        before = task.point()
        if not torch.equal(task.weights, start):
            break
        task.optimizer.step(task.upper, task.lower)
    with pytest.raises(error, match=match):
        task.optimizer.step(task.upper, task.lower)
    assert torch.equal(task.point(), before)


@pytest.mark.parametrize(("kind", "options"), MAKERS)
@pytest.mark.parametrize("made", [torch.sigmoid, lambda u: 2 * u + 0.5, torch.Tensor.exp])
def test_it_is_refused_as_soon_as_u_has_moved(kind, options, made):
    task = Weighted(kind, **options)
    w = made(task.weights)
    task.w = lambda: w
    refused(task)


@pytest.mark.parametrize(("kind", "options"), TWICE)
def test_where_it_is_gone_through_twice_torch_notices(kind, options):
    task = Weighted(kind, **options)
    w = task.weights.sigmoid()
    task.w = lambda: w
    with pytest.raises(DoubleBackwardError, match="uses tensors computed outside it"):
        task.optimizer.step(task.upper, task.lower)


def test_rules_that_hide_their_moves_from_versions():
    task = Weighted()
    u = task.weights
    upper = torch.optim.Adam([("weights", u)], lr=0.05, fused=True)
    task.optimizer = PenaltyBilevelOptimizer(upper, task.net.named_parameters())
    w = u.sigmoid()
    task.w = lambda: w
    refused(task)


def test_an_upper_loss_of_old_features():
    task = Weighted()
    output = task.net(task.x[8:])
    task.upper = lambda: (output - task.y[8:]).square().mean()
    task.optimizer.step(task.upper, task.lower)  # v moves, u does not
    with pytest.raises(ValueError, match=f"upper_closure.*{OLD}.*from parameter '2.weight'"):
        task.optimizer.step(task.upper, task.lower)


def test_of_one_micro_batch():
    task = Weighted()
    w, fresh = task.weights.sigmoid(), task.upper
    task.upper = [fresh, lambda: fresh() + 0.1 * w.mean()]
    refused(task, f"upper_closure.*{OLD}.*from parameter 'weights'")


def test_of_a_map():
    u, v = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, penalty="fixed_point")
    w = u.exp()
    both = lambda: (v - 1).square().sum() + u.sum(), lambda: (0.5 * v * w,)
    optimizer.step(*both)
    with pytest.raises(ValueError, match=f"lower_closure.*{OLD}"):
        optimizer.step(*both)


def test_new_closures_are_looked_at_in_mid_run():
    task = Weighted().run(5)
    w = task.weights.sigmoid()
    fresh = task.lower
    task.lower = lambda: fresh() + (w * sum(p.sum() for p in task.net.parameters())).mean()
    task.optimizer.step(task.upper, task.lower)
    with pytest.raises(ValueError, match=OLD):
        task.optimizer.step(task.upper, task.lower)


def run(task, before_each=lambda: None):
    for _ in range(5):
        before_each()
        task.optimizer.step(task.upper, task.lower)
    return task


def same_as_inside(task):
    """The same steps as with w computed inside, to the last bit."""
    assert torch.equal(task.point(), run(Weighted()).point())


def test_made_anew_before_every_step_it_is_right():
    task = Weighted()

    def renew():
        w = task.weights.sigmoid()
        task.w = lambda: w

    same_as_inside(run(task, renew))


def test_u_waits_during_lower_steps():
    task, twin = Weighted(**EXACT), Weighted(**EXACT)  # "auto" goes back twice where it compares
    for _ in range(3):
        w = task.weights.sigmoid()
        task.w = lambda w=w: w
        for one in (task, twin):
            for _ in range(3):
                one.optimizer.lower_step(one.upper, one.lower)
            one.optimizer.step(one.upper, one.lower)
    assert torch.equal(task.point(), twin.point())


@pytest.mark.parametrize("view", [lambda u: u[:8], lambda u: u.view(2, 4).view(8), lambda u: u.T.T])
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_views_stay_and_have_the_values_of_now(view):
    task = Weighted()
    w = view(task.weights)
    task.w = lambda: w.sigmoid()
    same_as_inside(run(task))


def test_a_graph_of_parameters_in_no_level():
    task = Weighted()
    encoder = nn.Linear(3, 3)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(3))
        encoder.bias.zero_()
    task.x = encoder(task.x)
    assert task.x.requires_grad
    same_as_inside(run(task))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.filterwarnings("ignore:.*which it keeps between its calls")
def test_modules_that_keep_something(monkeypatch):
    """Checkpoints, custom functions, parametrizations, states that are detached: not refused."""
    looked_at = run(keeping()).point()
    monkeypatch.setattr(MadeOutside, "look", lambda *_: None)
    assert torch.equal(looked_at, run(keeping()).point())


def keeping():
    task = Weighted()
    parametrize.register_parametrization(task.net[2], "weight", nn.Softplus())
    task.optimizer = PenaltyBilevelOptimizer([task.weights], task.net.parameters(), **EXACT)
    first, *rest = task.net
    kept = {}

    def forward(x):
        hidden = checkpoint(first, x, use_reentrant=False)
        for part in rest:
            hidden = part(hidden)
        hidden = hidden + 0.1 * kept.get("state", 0.0)
        kept["state"] = hidden.mean().detach()
        return Doubled.apply(hidden)

    task.net.forward = forward
    return task


def test_compiled_modules():
    task = Weighted()
    task.net = torch.compile(task.net, backend="eager")
    same_as_inside(run(task))


def test_only_the_first_steps_are_looked_at():
    task, seen = Weighted(), []

    def lower():
        loss = Weighted.lower(task)
        seen.append(loss.grad_fn)
        return loss

    looked = []
    for _ in range(8):
        seen.clear()
        task.optimizer.step(task.upper, lower)
        looked.append(any(isinstance(key, MadeOutside) for n in seen for key in n.metadata))
    assert looked[0]
    assert sum(looked) <= 4
    assert looked[-2:] == [False, False]


def test_copies_begin_anew():
    task = Weighted().run(2)
    assert copy.deepcopy(task.optimizer)._made_outside is not task.optimizer._made_outside
