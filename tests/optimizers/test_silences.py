"""What used to go wrong without a word: shared rates, 16-bit weights, autocast."""

import warnings

import pytest
import torch
from constrained import leaf
from problems import join
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from torch_penalty_bilevel import (
    BilevelWarning,
    HypergradientOptimizer,
    NonFiniteError,
    PenaltyBilevelOptimizer,
)
from torch_penalty_bilevel.curvature import Automatic, DoubleBackward, FiniteDifference
from torch_penalty_bilevel.curvature import autograd_graph as graph
from torch_penalty_bilevel.tensors import Pair, filled

BOTH = [PenaltyBilevelOptimizer, HypergradientOptimizer]


def two_rates(kind, **rates):
    rates = rates or {"upper_lr": 0.1, "lower_lr": 0.01}
    u, v = leaf([0.0]), leaf([0.0])
    f, g = lambda: (u**2 + v**2).sum(), lambda: ((1 - u - v) ** 2).sum()
    return kind([u], [v], **rates), f, g


def one_cycle(optimizer, **options):
    return lr_scheduler.OneCycleLR(optimizer, total_steps=20, cycle_momentum=False, **options)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: one_cycle(o, max_lr=0.1),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_one_rate_for_both_levels_is_named_once(kind, schedule):
    optimizer, f, g = two_rates(kind)
    scheduler = schedule(optimizer)
    with pytest.warns(BilevelWarning, match=r"one learning rate.*max_lr=\[0.1, 0.01\]"):
        optimizer.step(f, g)
    scheduler.step()
    optimizer.step(f, g)


@pytest.mark.parametrize("kind", BOTH)
def test_the_recipe_keeps_two_rates(kind):
    """And so do the schedulers that scale what they find, also where both end at one rate."""
    optimizer, f, g = two_rates(kind)
    scheduler = one_cycle(optimizer, max_lr=[0.1, 0.01])
    highest = [0.0, 0.0]
    for _ in range(19):
        optimizer.step(f, g)
        scheduler.step()
        lrs = [group["lr"] for group in optimizer.param_groups]
        highest = [max(a, b) for a, b in zip(highest, lrs, strict=True)]
        assert lrs[0] == pytest.approx(10 * lrs[1])
    assert highest == pytest.approx([0.1, 0.01], rel=0.05)

    optimizer, f, g = two_rates(kind)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=1e-4)
    for _ in range(4):
        optimizer.step(f, g)
        scheduler.step()


@pytest.mark.parametrize("kind", BOTH)
def test_levels_built_with_one_rate_may_share_one(kind):
    optimizer, f, g = two_rates(kind, upper_lr=0.05, lower_lr=0.05)
    one_cycle(optimizer, max_lr=0.1)
    optimizer.step(f, g)  # a warning would be an error
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BOTH)
def test_lower_weights_of_16_bits_are_named(kind, dtype):
    named = [("w", leaf([1.0, 2.0], dtype)), ("b", leaf([1.0], torch.float32))]
    with pytest.warns(BilevelWarning, match=r"\['w'\] have 16 bits.*float32.*autocast"):
        kind([leaf([0.0])], named)
    named[0][1].requires_grad_(False)
    kind([leaf([0.0], dtype)], named)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.bfloat16, "0.0039"), (torch.float16, "0.00049")]
)
@pytest.mark.parametrize("kind", BOTH)
def test_upper_weights_of_16_bits_that_a_step_cannot_move_are_named(kind, dtype, least):
    """Below 2 half a unit of rounding is eps / 2; Adam's first move is its learning rate."""
    v = leaf([1.0])
    rate = float(least) * 0.9
    u = leaf([2.0, 0.5], dtype)
    with pytest.warns(BilevelWarning, match=rf"'u' has 16 bits.* below {least} .*float32"):
        optimizer = kind([("u", u)], [("v", v)], upper_lr=rate)
    optimizer.step(lambda: v.sum() + u.sum().float(), lambda: ((v - u.float().sum()) ** 2).sum())
    assert u[0] == 2.0
    kind([leaf([2.0, 0.5], dtype)], [v], upper_lr=1.2 * float(least))
    kind([leaf([2.0, 0.5], torch.float32)], [v], upper_lr=rate)


class Classifier:
    """A small network, computed in 16 bits where asked for."""

    def __init__(self, kind, samples=64):
        torch.manual_seed(0)
        hidden = {"tanh": nn.Tanh(), "gelu": nn.GELU()}[kind]
        net = nn.Sequential(nn.Linear(16, 64), hidden, nn.Linear(64, 64), hidden, nn.Linear(64, 4))
        self.net = net.float()
        self.x, self.y = torch.randn(samples, 16).float(), torch.randint(4, (samples,))
        self.u = torch.zeros(samples, dtype=torch.float32, requires_grad=True)
        self.at = Pair((self.u,), tuple(self.net.parameters()))
        self.coarse = None

    def each(self):
        with torch.autocast("cpu", self.coarse or torch.bfloat16, enabled=self.coarse is not None):
            return F.cross_entropy(self.net(self.x), self.y, reduction="none")

    def f(self):
        return self.each()[:16].float().mean()

    def g(self, *_):
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.u.exp() * self.each().float()).mean() + 0.01 * decay

    def products(self, engine, direction):
        product = engine.linearise(self.g, self.at).product(direction)
        return [join(filled(*pair)) for pair in zip(product, self.at, strict=True)]


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("kind", ["tanh", "gelu"])
def test_differences_under_autocast_are_right_to_a_tenth(kind, where):
    """A shift right for float32 gave 1 to 4 times the product: the rounding of bfloat16 over it."""
    task = Classifier(kind)
    direction = DoubleBackward().linearise(task.g, task.at).residual
    exact = task.products(DoubleBackward(), direction)
    task.coarse = torch.bfloat16 if where == "inside" else None
    engine = FiniteDifference()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        found = task.products(engine, direction)
    assert engine.product_cost == 2
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.1


def test_autocast_may_come_and_go_around_the_step():
    """The step of float32 without it, that of the coarse dtype within."""
    task, engine = Classifier("tanh"), FiniteDifference()
    direction = DoubleBackward().linearise(task.g, task.at).residual
    exact = task.products(DoubleBackward(), direction)
    for enabled, allowed in ((False, 2e-3), (True, 0.1), (False, 2e-3)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = task.products(engine, direction)
        for one, other in zip(found, exact, strict=True):
            assert float((one - other).norm() / other.norm()) < allowed


def test_the_hypergradient_under_autocast_with_differences():
    """After sixty steps it is that of float32 double backward to a fifth at the same point."""
    task = Classifier("tanh")
    options = {"lower_lr": 0.01, "upper_lr": 0.0}
    optimizer = PenaltyBilevelOptimizer(
        [task.u], task.net.parameters(), curvature="finite_difference", **options
    )
    task.coarse = torch.bfloat16
    for _ in range(60):
        optimizer.step(task.f, task.g)
    task.coarse = None
    twin = PenaltyBilevelOptimizer(
        [task.u], task.net.parameters(), curvature="double_backward", **options
    )
    twin._dual = optimizer._dual
    points = []
    for one, coarse in ((optimizer, torch.bfloat16), (twin, None)):
        task.coarse = coarse
        one.upper_step(task.f, task.g)
        points.append(task.u.grad.clone())
    # J q of an MLP errs by 0.03 to 0.2 (benchmarks.coarse_products).
    assert float((points[0] - points[1]).norm() / points[1].norm()) < 0.2
    assert optimizer.metrics.adjoint_residual_norm < 2 * twin.metrics.adjoint_residual_norm


def test_auto_stays_exact_under_autocast_inside_the_closures():
    task = Classifier("gelu")
    optimizer = PenaltyBilevelOptimizer([task.u], task.net.parameters())
    task.coarse = torch.bfloat16
    for _ in range(12):
        optimizer.step(task.f, task.g)
    assert isinstance(optimizer.curvature, Automatic)
    assert not optimizer.curvature.switched


def test_the_coarsest_dtype_behind_a_loss():
    w = leaf([1.0, 2.0], torch.float32)
    assert graph.coarsest(w.sum()) == torch.float32
    assert graph.coarsest(w.double().sum()) == torch.float32
    assert graph.coarsest(w.to(torch.bfloat16).float().sum()) == torch.bfloat16
    assert graph.coarsest(w.half().float().sum()) == torch.float16


def test_overflow_names_the_dtype_that_needs_no_scaler():
    u, v = leaf([1.0], torch.float32), leaf([1.0], torch.float32)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    with pytest.raises(NonFiniteError, match="bfloat16, which needs no GradScaler"):
        optimizer.step(
            lambda: ((v * 300).half() ** 2).float().sum() + u.sum(), lambda: ((v - u) ** 2).sum()
        )


def test_no_warning_in_plain_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, f, g = two_rates(PenaltyBilevelOptimizer)
        lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.step(f, g)
