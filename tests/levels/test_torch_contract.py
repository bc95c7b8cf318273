"""It is a torch.optim.Optimizer: groups, learning rates, schedulers and hooks."""

import pytest
import torch
from tasks import Task
from torch import nn
from torch.optim import lr_scheduler

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer


def test_is_an_optimizer_with_levels():
    optimizer = Task().optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [g["level"] for g in optimizer.param_groups] == ["upper", "lower"]
    assert isinstance(optimizer.upper, torch.optim.Adam)
    assert optimizer.param_groups[0] is optimizer.upper.param_groups[0]
    assert "level: lower" in repr(optimizer)
    assert "bilevel" not in repr(optimizer)


def test_parameters_may_come_in_every_form_of_torch_optim():
    ends = []
    for form in range(4):
        task = Task()
        u, net = task.weights, task.net
        upper = [[u], [("w", u)], [{"params": [u], "lr": 0.05}], torch.optim.Adam([u], lr=0.05)]
        lower = [
            net.parameters(),
            net.named_parameters(),
            [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.02}],
            torch.optim.Adam(net.parameters(), lr=0.02),
        ]
        rates = {"upper_lr": 0.05, "lower_lr": 0.02} if form < 3 else {}
        task.optimizer = PenaltyBilevelOptimizer(upper[form], lower[form], **rates)
        ends.append(task.run(5).point())
    assert all(torch.equal(ends[0], end) for end in ends[1:])


def test_a_group_learning_rate_wins_over_the_level_one():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [{"params": [a], "lr": 0.5}, {"params": [b]}]
    lower = torch.ones(1, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(groups, [lower], upper_lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1, 1e-3]


def test_any_rule_moves_a_level():
    for rule in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        task = Task()
        start = task.point()
        task.optimizer = PenaltyBilevelOptimizer(
            rule([task.weights], lr=0.01), rule(task.net.parameters(), lr=0.01, weight_decay=0)
        )
        task.run(3)
        moved = task.point() != start
        assert moved[:8].all(), rule
        assert moved[8:].all(), rule


def test_sgd_takes_exactly_the_reported_gradients():
    task = Task()
    task.optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([task.weights], lr=0.1), torch.optim.SGD(task.net.parameters(), lr=0.2)
    )
    task.run(2)
    before = task.point()
    task.run(1)
    gradient = torch.cat(
        [0.1 * task.weights.grad, *(0.2 * p.grad.flatten() for p in task.net.parameters())]
    )
    torch.testing.assert_close(before - task.point(), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 0.5**t]),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.05], total_steps=6),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.7)], [2]
        ),
    ],
)
def test_schedulers_drive_both_levels(make):
    """The learning rates equal those of the same scheduler on a plain optimizer."""
    task = Task()
    plain = torch.optim.Adam(
        [{"params": [torch.zeros(1)], "lr": 0.05}, {"params": [torch.zeros(1)], "lr": 0.02}]
    )
    mine, theirs = make(task.optimizer), make(plain)
    for _ in range(4):
        task.run(1)
        plain.step()
        mine.step()
        theirs.step()
        assert [g["lr"] for g in task.optimizer.param_groups] == [
            g["lr"] for g in plain.param_groups
        ]
        assert task.optimizer.lower.param_groups[0]["lr"] == plain.param_groups[1]["lr"]


def test_plateau_scheduler_and_scheduler_on_one_level():
    task = Task()
    plateau = lr_scheduler.ReduceLROnPlateau(task.optimizer, patience=0)
    inner = lr_scheduler.ExponentialLR(task.optimizer.lower, 0.5)
    task.run(1)
    inner.step()
    assert [g["lr"] for g in task.optimizer.param_groups] == [0.05, 0.01]
    plateau.step(1.0)
    plateau.step(2.0)
    assert [g["lr"] for g in task.optimizer.param_groups] == [
        pytest.approx(0.005),
        pytest.approx(0.001),
    ]


def test_half_steps_satisfy_a_scheduler():
    """No 'lr_scheduler.step() before optimizer.step()' warning, which would be an error here."""
    task = Task()
    scheduler = lr_scheduler.StepLR(task.optimizer, 1)
    for _ in range(2):
        task.optimizer.lower_step(task.upper, task.lower)
        task.optimizer.upper_step(task.upper, task.lower)
        scheduler.step()
    assert [g["lr"] for g in task.optimizer.param_groups] == [
        pytest.approx(0.0005),
        pytest.approx(0.0002),
    ]


@pytest.mark.parametrize("half", ["lower_step", "upper_step"])
@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_either_half_alone_satisfies_a_scheduler(kind, half):
    u, v = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = kind([u], [v], upper_lr=0.1, lower_lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    getattr(optimizer, half)(lambda: (v - 1).square().sum(), lambda: (v - u).square().sum())
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(0.01)] * 2


def test_hooks_on_the_rules_clip_and_hooks_on_the_whole_see_steps():
    task, calls = Task(), []
    limit = 1e-3

    def clip(rule, args, kwargs):
        nn.utils.clip_grad_norm_([p for g in rule.param_groups for p in g["params"]], limit)

    task.optimizer.upper.register_step_pre_hook(clip)
    task.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    task.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    task.run(2)
    assert calls == ["pre", "post"] * 2
    assert float(task.weights.grad.norm()) <= limit * (1 + 1e-6)
    assert float(task.optimizer.metrics.upper_grad_norm) > limit


def test_zero_grad_clears_both_levels():
    task = Task().run(1)
    assert task.weights.grad is not None
    task.optimizer.zero_grad()
    assert task.weights.grad is None
    assert all(p.grad is None for p in task.net.parameters())


def test_add_param_group_to_either_level():
    task = Task().run(2)
    extra_upper = torch.zeros(1, requires_grad=True)
    extra_lower = torch.zeros(1, requires_grad=True)
    before = task.optimizer.adjoint
    task.optimizer.add_param_group({"params": extra_lower, "level": "lower", "lr": 0.1})
    task.optimizer.add_param_group({"params": [extra_upper], "level": "upper"})
    groups = task.optimizer.param_groups
    assert [g["level"] for g in groups] == ["upper", "lower", "lower", "upper"]
    assert groups[3]["lr"] == task.optimizer.upper.defaults["lr"] == 0.05
    assert len(task.optimizer.adjoint) == 5
    assert torch.equal(task.optimizer.adjoint[0], before[0])
    for _ in range(2):
        task.optimizer.step(
            lambda: task.upper() + (extra_lower - 1).square().sum(),
            lambda: task.lower() + (extra_lower - extra_upper - 0.3).square().sum(),
        )
    assert extra_lower.item() != 0
    assert extra_upper.item() != 0
    with pytest.raises(ValueError, match="already in a group"):
        task.optimizer.add_param_group({"params": [task.weights], "level": "lower"})
    with pytest.raises(ValueError, match="already in a group"):
        task.optimizer.add_param_group({"params": [("w", task.weights)], "level": "upper"})
    with pytest.raises(ValueError, match='needs "level"'):
        task.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})


def test_a_group_added_to_a_rule_directly_is_seen():
    task = Task().run(1)
    extra = torch.zeros(1, requires_grad=True)
    task.optimizer.upper.add_param_group({"params": [extra]})
    assert [g["level"] for g in task.optimizer.param_groups] == ["upper", "lower", "upper"]
    # And keeps its place: schedulers count on the order.
    late = torch.zeros(1, requires_grad=True)
    task.optimizer.add_param_group({"params": [late], "level": "lower"})
    assert [g["level"] for g in task.optimizer.param_groups] == ["upper", "lower"] * 2


def test_frozen_parameters_stay_and_may_thaw():
    task = Task()
    frozen = task.net[0].weight
    frozen.requires_grad_(False)
    start = frozen.detach().clone()
    task.run(3)
    assert torch.equal(frozen, start)
    assert torch.equal(task.optimizer.adjoint[0], torch.zeros_like(start))
    frozen.requires_grad_(True)
    task.run(1)
    assert not torch.equal(frozen, start)
