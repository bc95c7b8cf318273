"""Closures that choose the mode themselves: the pass that trains moves the statistics, once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.undo.buffers import BufferGuard
from torch_penalty_bilevel.undo.scope import Scope

FAR = 10.0
"""Mean of the inputs of g; those of f have the opposite."""


class Modes:
    """BatchNorm first, so that its statistics after k steps are known: m (1 - 0.9^k)."""

    def __init__(self, of_f, of_g, kind=PenaltyBilevelOptimizer, **options):
        torch.manual_seed(0)
        self.x, self.x_clean = torch.randn(16, 3) + FAR, torch.randn(8, 3) - FAR
        self.y, self.y_clean = self.x.argmax(1), self.x_clean.argmax(1)
        self.norm = nn.BatchNorm1d(3)
        self.net = nn.Sequential(self.norm, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.u = torch.zeros(16, requires_grad=True)
        self.modes = {"f": of_f, "g": of_g}
        self.optimizer = kind([self.u], self.net.parameters(), **options)
        self.seen = []

    def enter(self, loss):
        mode, _, after = self.modes[loss].partition(", then ")
        self.net.train(mode == "train")
        return lambda: self.net.train(after == "train") if after else None

    def part_of_f(self, rows=slice(None)):
        leave = self.enter("f")
        self.seen.append(self.norm.running_mean.clone())
        loss = F.cross_entropy(self.net(self.x_clean[rows]), self.y_clean[rows])
        leave()
        return loss

    def part_of_g(self, rows=slice(None)):
        leave = self.enter("g")
        losses = F.cross_entropy(self.net(self.x[rows]), self.y[rows], reduction="none")
        leave()
        return (self.u[rows].sigmoid() * losses).mean() + 0.01 * self.net[1].weight.square().sum()

    def check_moved(self, steps, mean):
        assert int(self.norm.num_batches_tracked) == steps
        torch.testing.assert_close(self.norm.running_mean, mean * (1 - 0.9**steps))

    def check(self, steps, trains="g"):
        self.check_moved(steps, (self.x if trains == "g" else self.x_clean).mean(0))


ENGINES = ["auto", "double_backward", "finite_difference"]
OPTIONS = [{"curvature": name, "lower_steps": 1 + i} for i, name in enumerate(ENGINES)]
OPTIONS += [{"penalty": "value"}, {"penalty": "paper"}]


@pytest.mark.parametrize("starts", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("of_f", "of_g", "trains"),
    [
        ("eval", "train", "g"),
        ("train", "eval", "f"),
        ("eval, then train", "train", "g"),
        ("eval, then eval", "train, then eval", "g"),
        ("train, then eval", "eval", "f"),
        ("train", "train", "g"),
    ],
)
def test_the_pass_that_trains_moves_the_statistics_once(of_f, of_g, trains, options, starts):
    task = Modes(of_f, of_g, **options)
    task.net.train(starts)
    for step in range(1, 3):
        before = task.norm.running_mean.clone()
        task.seen.clear()
        task.optimizer.step(task.part_of_f, task.part_of_g)
        task.check(step, trains)
        assert all(torch.equal(mean, before) for mean in task.seen)  # f's are those of before
        last = task.modes["g"]
        assert task.net.training == last.endswith("train")  # as the closure left it


@pytest.mark.parametrize("method", ["cg", "neumann", "reverse", "one_step", "stochastic"])
def test_every_method_of_hypergradients(method):
    options = {"lower_steps": 3, "lower_lr": 0.01, "warm_start": True}
    extra = {"damping": 5.0} if method == "cg" else {}
    task = Modes("eval", "train", HypergradientOptimizer, method=method, **options, **extra)
    for step in range(1, 3):
        task.optimizer.step(task.part_of_f, task.part_of_g)
        task.check(step)


def test_the_halves_plain_steps_and_the_check():
    task = Modes("eval", "train")
    both = task.part_of_f, task.part_of_g
    calls = [
        lambda: task.optimizer.plain_lower_step(task.part_of_g),
        lambda: task.optimizer.lower_step(*both),
        lambda: task.optimizer.upper_step(*both),
        lambda: task.optimizer.step(*both),
    ]
    for step, call in enumerate([*calls, *calls], 1):
        task.net.train(step % 2 == 0)  # what was done in between does not matter
        call()
        task.check(step)
    task.optimizer.check_hypergradient(*both, resolve=False)
    task.check(8)


@pytest.mark.parametrize("curvature", ENGINES)
def test_micro_batches_go_on_where_the_one_before_left_them(curvature):
    task = Modes("eval", "train", curvature=curvature)
    halves = [slice(0, 8), slice(8, 16)]
    f = [lambda: task.part_of_f(slice(0, 4)), lambda: task.part_of_f(slice(4, 8))]
    g = [lambda: task.part_of_g(halves[0]), lambda: task.part_of_g(halves[1])]
    mean = torch.zeros(3)
    for step in range(1, 4):
        task.optimizer.step(f, g)
        for rows in halves:
            mean = 0.9 * mean + 0.1 * task.x[rows].mean(0)
        torch.testing.assert_close(task.norm.running_mean, mean)
        assert int(task.norm.num_batches_tracked) == 2 * step


def test_pure_functions():
    task = Modes("eval", "train")
    names = [name for name, _ in task.net.named_parameters()]
    pairs = [("u", task.u)], list(task.net.named_parameters())
    optimizer = PenaltyBilevelOptimizer(*pairs, curvature="functional")

    def called(lower, x):
        return torch.func.functional_call(task.net, {n: lower[n] for n in names}, x)

    def f(upper, lower):
        task.net.eval()
        return F.cross_entropy(called(lower, task.x_clean), task.y_clean)

    def g(upper, lower):
        task.net.train()
        losses = F.cross_entropy(called(lower, task.x), task.y, reduction="none")
        return (upper["u"].sigmoid() * losses).mean()

    for step in range(1, 4):
        optimizer.step(f, g)
        task.check(step)


def test_a_step_that_fails_moves_nothing():
    task = Modes("eval", "train")
    task.optimizer.step(task.part_of_f, task.part_of_g)
    with pytest.raises(RuntimeError, match="not finite"):
        task.optimizer.step(task.part_of_f, lambda: task.part_of_g() * float("nan"))
    task.check(1)


@pytest.mark.parametrize("searches", [True, False])
def test_what_was_never_seen_training_is_not_copied(searches):
    """Buffers may be large, as those of a backbone in few bits; in the search all are copied."""
    norm, scope, seen = nn.BatchNorm1d(3).eval(), Scope(), []

    def evaluate():
        with BufferGuard(scope).evaluation("lower", lambda: norm):
            norm(torch.randn(4, 3))
            seen.append(norm.running_mean is original)

    original = norm.running_mean
    if searches:
        with scope.searching():
            evaluate()
    evaluate()
    assert seen == [False, True] if searches else [True]


def test_statistics_without_a_counter_are_seen_to_train_as_well():
    """The kernel does not say that it writes, and the closure puts the mode back."""
    norm, scope = nn.Module().eval(), Scope()
    norm.register_buffer("mean", torch.zeros(3))
    norm.register_buffer("variance", torch.ones(3))
    x = torch.randn(8, 3) + FAR

    def loss():
        norm.train()
        F.batch_norm(x, norm.mean, norm.variance, training=norm.training)
        norm.eval()

    def step(evaluations):
        guard = BufferGuard(scope)
        for _ in range(evaluations):
            with guard.evaluation("lower", lambda: norm):
                loss()
        guard.commit()

    with scope.searching():
        step(1)
    step(3)
    torch.testing.assert_close(norm.mean, 0.19 * x.mean(0))


def test_buffers_that_cannot_be_compared_count_as_moved():
    module, scope = nn.Module().eval(), Scope()
    module.register_buffer("odd", torch.zeros(2, device="meta"))
    with scope.searching(), BufferGuard(scope).evaluation("lower", lambda: module):
        pass
    assert module in scope.trained
