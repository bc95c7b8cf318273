"""A level as a list of ready rules: as one rule over all of it, and each by its own way."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW, Muon

from torch_penalty_bilevel import HypergradientOptimizer, NonFiniteError, PenaltyBilevelOptimizer
from torch_penalty_bilevel.levels import Together

PENALTIES = ("stationarity", "value", "paper", "hypergradient")


class Task:
    """Sample weights and an entry below which u pulls; v a matrix and a bias."""

    def __init__(self, make=None, penalty="stationarity", **options):
        self.X, self.y = torch.randn(6, 3), torch.randn(6, 2)
        torch.manual_seed(1)
        self.weights, self.pull = torch.zeros(6), torch.zeros(1)
        self.W, self.b = torch.randn(3, 2), torch.randn(2)
        for tensor in (self.weights, self.pull, self.W, self.b):
            tensor.requires_grad_()
        self.scale, self.batch = 1.0, slice(0, 6)
        upper, lower = (make or self.one)(self.weights, self.pull, self.W, self.b)
        if penalty == "hypergradient":
            self.optimizer = HypergradientOptimizer(upper, lower, **options)
        else:
            self.optimizer = PenaltyBilevelOptimizer(upper, lower, penalty=penalty, **options)

    @staticmethod
    def one(weights, pull, W, b):
        """One Adam per level."""
        return (
            Adam([{"params": [weights]}, {"params": [pull], "lr": 0.03}], lr=0.1),
            Adam([{"params": [W]}, {"params": [b], "lr": 0.01}], lr=0.05, weight_decay=0.01),
        )

    @staticmethod
    def several(weights, pull, W, b):
        """The same with an Adam for each tensor."""
        return (
            [Adam([weights], lr=0.1), Adam([pull], lr=0.03)],
            [Adam([W], lr=0.05, weight_decay=0.01), Adam([b], lr=0.01, weight_decay=0.01)],
        )

    def f(self):
        out = self.X @ self.W + self.b - self.y
        return self.scale * (out.square().mean() + 0.1 * self.pull.square().sum())

    def g(self):
        loss = (self.X @ self.W + self.b + 0.3 * self.y).square().mean(1)[self.batch]
        return (self.weights[self.batch].sigmoid() * loss).mean() + (
            0.1 * self.W.square().sum() + (self.b - self.pull).square().sum()
        )

    def step(self):
        return self.optimizer.step(self.f, self.g)

    def values(self):
        return [t.detach().clone() for t in (self.weights, self.pull, self.W, self.b)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_list_of_rules_is_one_rule_over_all(penalty):
    one, several = Task(penalty=penalty), Task(Task.several, penalty)
    several.X, several.y = one.X, one.y
    for number in range(15):
        one.batch = several.batch = slice(0, 6 if number % 3 else 2)  # rows outside of the batch
        assert torch.equal(one.step(), several.step())
        assert same(one.values(), several.values())
    assert isinstance(several.optimizer.upper, Together)
    assert [g["lr"] for g in several.optimizer.param_groups] == [0.1, 0.03, 0.05, 0.01]
    assert len(several.optimizer.lower.state) == 2


def muon(weights, pull, W, b):
    return Adam([weights, pull], lr=0.1), [Muon([W], lr=0.02, weight_decay=0.0), SGD([b], lr=0.1)]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("make", [Task.several, muon])
def test_runs_resume_bit_equally(penalty, make):
    task = Task(make, penalty)
    for _ in range(4):
        task.step()
    file = io.BytesIO()
    torch.save({"optimizer": task.optimizer.state_dict(), "values": task.values()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Task(make, penalty)
    twin.X, twin.y = task.X, task.y
    twin.optimizer.load_state_dict(saved["optimizer"])
    for tensor, value in zip(
        (twin.weights, twin.pull, twin.W, twin.b), saved["values"], strict=True
    ):
        tensor.data.copy_(value)
    copied, pickled = copy.deepcopy(task), pickle.loads(pickle.dumps(task))
    for _ in range(4):
        task.step()
        for other in (twin, copied, pickled):
            other.step()
            assert same(task.values(), other.values())


def test_torchs_checkpoint_tools_keep_all_rules():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.zeros(6))
            self.pull = torch.nn.Parameter(torch.zeros(1))
            self.W = torch.nn.Parameter(torch.ones(3, 2))
            self.b = torch.nn.Parameter(torch.zeros(2))

    def made():
        task, net = Task(), Net()
        task.weights, task.pull, task.W, task.b = net.weights, net.pull, net.W, net.b
        task.optimizer = PenaltyBilevelOptimizer(*muon(net.weights, net.pull, net.W, net.b))
        return task, net

    (task, net), (twin, other) = made(), made()
    twin.X, twin.y = task.X, task.y
    for _ in range(4):
        task.step()
    saved = copy.deepcopy(get_optimizer_state_dict(net, task.optimizer))
    set_optimizer_state_dict(other, twin.optimizer, saved)
    other.load_state_dict(net.state_dict())
    for _ in range(4):
        task.step()
        twin.step()
        assert same(task.values(), twin.values())


def test_hooks_of_the_whole_run_around_those_of_its_rules():
    task, calls = Task(Task.several), []

    def says(what):
        return lambda rule, args, kwargs: calls.append((what, rule.param_groups[0]["weight_decay"]))

    whole = task.optimizer.lower
    whole.register_step_pre_hook(says("before all"))
    whole.register_step_post_hook(says("after all"))
    for number, rule in enumerate(whole.rules):
        rule.register_step_pre_hook(says(number))
    task.step()
    # The decay is in the gradients already, and hooks see it in the options all the same.
    order = ["before all", 0, 1, "after all"]
    assert calls == [(what, 0.01) for what in order]
    # Rows outside of the batch are left out of the arithmetic, not of what hooks see.
    shapes, task.batch = [], slice(0, 2)
    task.optimizer.upper.rules[0].register_step_pre_hook(
        lambda rule, args, kwargs: shapes.append(task.weights.grad.shape)
    )
    task.step()
    assert shapes == [(6,)]
    assert int((task.weights.grad == 0).sum()) == 4


@pytest.mark.parametrize("hooked", ["whole", "rule"])
def test_rows_outside_of_the_batch_stay_where_a_hook_centres_gradients(hooked):
    ends = []
    for make in (Task.one, Task.several):
        task = Task(make)
        task.X, task.y, task.batch = torch.ones(6, 3), torch.arange(12.0).view(6, 2), slice(0, 2)
        upper = task.optimizer.upper

        def centre(rule, args, kwargs, weights=task.weights):
            weights.grad.sub_(weights.grad.mean())

        one_of_them = upper.rules[0] if isinstance(upper, Together) else upper
        (upper if hooked == "whole" else one_of_them).register_step_pre_hook(centre)
        for _ in range(4):
            task.step()
        ends.append(task.weights.detach())
    assert torch.equal(*ends)
    assert bool((ends[0][2:] == 0).all())
    assert bool((ends[0][:2] != 0).all())


def test_a_checkpoint_of_rules_in_another_order_is_refused():
    saved = copy.deepcopy(stepped(muon).optimizer.state_dict())
    other = stepped(lambda *at: (muon(*at)[0], muon(*at)[1][::-1]))
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"group 1 .* another kind of rule: it has .*'ns_steps'"):
        other.optimizer.load_state_dict(saved)
    assert str(other.optimizer.state_dict()) == str(before)
    other.step()


def stepped(make):
    task = Task(make)
    task.step()
    return task


def test_rules_may_come_in_any_iterable():
    task = Task(lambda *at: tuple(iter(level) for level in Task.several(*at)))
    assert [len(level.rules) for level in (task.optimizer.upper, task.optimizer.lower)] == [2, 2]


def test_a_scheduler_cycles_the_momentum_of_each_rule():
    a, b, c, d = (torch.ones(2, requires_grad=True) for _ in range(4))
    upper = [SGD([a], lr=0.1, momentum=0.9), SGD([b], lr=0.1, momentum=0.8)]
    lower = [SGD([c], lr=0.1, momentum=0.9), SGD([d], lr=0.1, momentum=0.9)]
    optimizer = PenaltyBilevelOptimizer(upper, lower)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1] * 4, total_steps=10)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.95] * 4


def test_the_state_has_entries_only_where_a_rule_has():
    task = Task(Task.several)
    state = task.optimizer.lower.state
    assert task.W not in state
    assert state.get(task.W) is None
    assert len(state) == 0
    assert not any(rule.state for rule in task.optimizer.lower.rules)
    task.step()
    assert set(map(id, state)) == {id(task.W), id(task.b)}
    state[task.W] = {"mine": 1}
    assert task.optimizer.lower.rules[0].state[task.W] == {"mine": 1}
    del state[task.b]
    assert not task.optimizer.lower.rules[1].state


def test_a_step_that_fails_changes_nothing():
    task = Task(muon)
    for _ in range(2):
        task.step()
    before, state = task.values(), copy.deepcopy(task.optimizer.state_dict())
    task.scale = float("nan")
    with pytest.raises(NonFiniteError):
        task.step()
    assert same(before, task.values())
    after = task.optimizer.state_dict()
    for key, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after["state"][key][name]), name


def test_a_group_goes_to_the_rule_it_names():
    """The last tensor of the level, wherever its rule stands in the list: its multiplier too."""
    task = Task(muon)
    task.step()
    c = torch.zeros(3, 2, requires_grad=True)
    task.optimizer.add_param_group({"params": [c], "level": "lower", "rule": 0, "lr": 0.5})
    matrices, rest = task.optimizer.lower.rules
    assert [len(rule.param_groups) for rule in (matrices, rest)] == [2, 1]
    assert task.optimizer.param_groups[-1]["params"] == [c]
    assert "rule" not in task.optimizer.param_groups[-1]
    assert task.optimizer.adjoint[-1].shape == (3, 2)
    g = task.g
    task.g = lambda: g() + (c - task.pull).square().sum()
    for _ in range(3):
        task.step()
    assert "momentum_buffer" in matrices.state[c]
    with pytest.raises(ValueError, match='"rule" must be a number from 0 to 1, got 2'):
        task.optimizer.add_param_group({"params": [torch.ones(2)], "level": "lower", "rule": 2})


def test_schedulers_reach_every_rule():
    task = Task(muon)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(task.optimizer, 0.5)
    task.step()
    scheduler.step()
    assert [rule.param_groups[0]["lr"] for rule in task.optimizer.lower.rules] == [0.01, 0.05]


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        (lambda W, b: [SGD([W], lr=0.1), b], TypeError, "lower mixes optimizers and parameters"),
        (lambda W, b: [SGD([W], lr=0.1), SGD([W, b], lr=0.1)], ValueError, "two of the rules"),
        (lambda W, b: [SGD([W], lr=0.1), torch.optim.LBFGS([b])], ValueError, "cannot be LBFGS"),
        (lambda W, b: [SGD([W], lr=0.1), AdamW([b])], ValueError, "AdamW with weight_decay=0.01"),
    ],
)
def test_what_is_refused(rules, error, match):
    u, W, b = (torch.ones(2, requires_grad=True) for _ in range(3))
    with pytest.raises(error, match=match):
        PenaltyBilevelOptimizer([u], rules(W, b))


def test_a_rate_beside_ready_rules_has_no_effect():
    u, W = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"lower_lr=0\.1 has no effect: lower is a ready Together"):
        PenaltyBilevelOptimizer([u], [SGD([W], lr=0.1)], lower_lr=0.1)
