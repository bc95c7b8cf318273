"""Options of a rule that change which problem a level solves: taken into g, or refused."""

import copy
import functools

import pytest
import torch
from torch import optim

from torch_penalty_bilevel import (
    HypergradientOptimizer,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)

H, TARGET = torch.tensor([[1.0, 0.2], [1.0, -0.5]], dtype=torch.float64)
DECAY = 0.1
COUPLED = {
    "SGD": lambda p, **o: optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "Adam": lambda p, **o: optim.Adam(p, lr=0.02, **o),
    "Adamax": lambda p, **o: optim.Adamax(p, lr=0.02, **o),
    "Adagrad": lambda p, **o: optim.Adagrad(p, lr=0.1, **o),
    "Adadelta": lambda p, **o: optim.Adadelta(p, **o),
    "RMSprop": lambda p, **o: optim.RMSprop(p, lr=0.02, **o),
    "NAdam": lambda p, **o: optim.NAdam(p, lr=0.02, **o),
    "RAdam": lambda p, **o: optim.RAdam(p, lr=0.02, **o),
    "ASGD": lambda p, **o: optim.ASGD(p, lr=0.1, lambd=0, **o),
}
MAKERS = {
    "penalty": (PenaltyBilevelOptimizer, {}),
    "functional": (PenaltyBilevelOptimizer, {"curvature": "functional"}),
    "differences": (PenaltyBilevelOptimizer, {"curvature": "finite_difference"}),
    "value": (PenaltyBilevelOptimizer, {"penalty": "value"}),
    "paper": (PenaltyBilevelOptimizer, {"penalty": "paper", "lower_steps": 2}),
    "cg": (HypergradientOptimizer, {}),
    "cg functional": (HypergradientOptimizer, {"curvature": "functional"}),
}


class Shrunk:
    """g = sum h (v - u)^2 / 2 with decay wd: v*(u) = h u / (h + wd)."""

    def __init__(self, rule="SGD", how="penalty", written=0.0, **options):
        self.u, self.v = torch.zeros((), requires_grad=True), torch.zeros(2, requires_grad=True)
        self.spare = torch.ones(2, requires_grad=True)  # of the same group, in no loss
        make, given = MAKERS[how]
        self.written = written
        lower = COUPLED[rule]([self.v, self.spare], **options)
        self.optimizer = make([self.u], lower, upper_lr=0.01, **given)

    def f(self, upper=None, lower=None):
        v = (lower or (self.v,))[0]
        return 0.5 * (v - TARGET).square().sum() + 0.01 * (upper or (self.u,))[0].square()

    def g(self, upper=None, lower=None):
        u, v = (upper or (self.u,))[0], (lower or (self.v,))[0]
        return 0.5 * (H * (v - u).square()).sum() + 0.5 * self.written * v.square().sum()

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.f, self.g)
        return self


@pytest.mark.filterwarnings("ignore:.*lower loss does not depend on")
@pytest.mark.parametrize(
    ("rule", "how"), [*((r, "penalty") for r in COUPLED), *(("SGD", h) for h in MAKERS)]
)
def test_coupled_decay_is_a_part_of_g(rule, how):
    """Step by step that of the decay written into g; what no loss uses does not decay."""
    option, written = Shrunk(rule, how, weight_decay=DECAY), Shrunk(rule, how, written=DECAY)
    for _ in range(12):
        option.run(1)
        written.run(1)
        for a, b in ((option.u, written.u), (option.v, written.v)):
            # Differences of gradients round where the loss is computed in another order.
            slack = 1e-6 if how == "differences" else 1e-11
            torch.testing.assert_close(a.detach(), b.detach(), rtol=slack, atol=slack)
    assert abs(option.u.item()) > 0.01
    assert torch.equal(option.spare, torch.ones(2))
    assert option.optimizer.lower.param_groups[0]["weight_decay"] == DECAY
    torch.testing.assert_close(
        option.optimizer.metrics.lower_loss, written.optimizer.metrics.lower_loss
    )


@pytest.mark.filterwarnings("ignore:.*lower loss does not depend on")
@pytest.mark.long
def test_the_solution_and_the_self_check_are_those_of_the_decayed_problem():
    run = Shrunk("SGD", weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 1500)
    for _ in range(1500):
        run.run(1)
        schedule.step()
    c = H / (H + DECAY)
    best = (c * TARGET).sum() / ((c * c).sum() + 0.02)
    torch.testing.assert_close(run.u.detach(), best, rtol=1e-3, atol=0)
    torch.testing.assert_close(run.v.detach(), c * run.u.detach(), rtol=1e-3, atol=0)
    with torch.no_grad():
        run.u.add_(0.3)
        run.v.copy_(c * run.u)
    report = run.optimizer.check_hypergradient(run.f, run.g, resolve=True)
    for slope in report.slopes:
        u = run.u.detach()
        exact = float((c * (c * u - TARGET)).sum() + 0.02 * u)
        assert abs(slope.resolved) == pytest.approx(abs(exact), rel=1e-4)
        assert abs(slope.exact) == pytest.approx(abs(exact), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*lower loss does not depend on")
def test_hooks_see_the_decay_and_may_change_it():
    run, seen = Shrunk("SGD", weight_decay=DECAY), []

    def halve(rule, *_):
        seen.append(rule.param_groups[0]["weight_decay"])
        rule.param_groups[0]["weight_decay"] *= 0.5

    run.optimizer.lower.register_step_pre_hook(halve)
    run.optimizer.lower.register_step_post_hook(
        lambda rule, *_: seen.append(rule.param_groups[0]["weight_decay"])
    )
    run.run(2)
    assert seen == [DECAY, DECAY / 2, DECAY / 2, DECAY / 4]


def test_reverse_mode_goes_through_decayed_steps():
    u, v = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    rule = optim.SGD([v], lr=0.1, weight_decay=DECAY)
    optimizer = HypergradientOptimizer([u], rule, method="reverse", lower_steps=3, upper_lr=0.0)
    optimizer.step(lambda: (v - 1) ** 2, lambda: 0.5 * (v - u) ** 2)
    keep = 1 - 0.1 * (1 + DECAY)  # v <- keep v + .1 u
    end = keep**3 * 0.2 + 0.1 * (1 + keep + keep**2) * 0.5
    slope = 2 * (end - 1) * 0.1 * (1 + keep + keep**2)
    assert v.item() == pytest.approx(end, rel=1e-12)
    assert u.grad.item() == pytest.approx(slope, rel=1e-12)


class Own(optim.Optimizer):
    def __init__(self, params, **options):
        super().__init__(params, {"lr": 0.1, **options})

    def step(self, closure=None): ...


REFUSED = {
    "AdamW": (optim.AdamW, {}, "weight_decay=0.01 decoupled"),
    "Adam decoupled": (
        optim.Adam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "decoupled",
    ),
    "NAdam decoupled": (
        optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "decoupled",
    ),
    "Adafactor": (optim.Adafactor, {"weight_decay": 0.1}, "decoupled"),
    "Muon": (optim.Muon, {}, "default of AdamW and Muon is not 0"),
    "ASGD": (optim.ASGD, {}, "lambd=0.0001"),
    "unknown": (Own, {"weight_decay": 0.1}, "0.5 \\* 0.1 \\* sum"),
    "maximize": (optim.SGD, {"maximize": True}, "return -loss from lower_closure"),
}


def pair():
    return torch.zeros((), requires_grad=True), torch.zeros(2, 2, requires_grad=True)


@pytest.mark.parametrize("make", [PenaltyBilevelOptimizer, HypergradientOptimizer])
@pytest.mark.parametrize("case", REFUSED)
def test_what_g_cannot_hold_is_refused_wherever_it_comes_in(make, case):
    kind, options, message = REFUSED[case]
    u, v = pair()
    with pytest.raises(ValueError, match=message):
        make([u], kind([v], **options))
    # Later: by hand, by a new group, by a checkpoint.
    off = dict.fromkeys(options, 0.0) | {"weight_decay": 0.0}
    off |= {"maximize": False} if "maximize" in options else {}
    off |= {"lambd": 0.0} if kind is optim.ASGD else {}
    optimizer = make([u], kind([v], **off))
    on = kind([v], **options).param_groups[0]
    bad = {k: x for k, x in on.items() if k not in ("params", "lr")}
    new = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [new], "level": "lower", **bad})
    assert len(optimizer.param_groups) == 2
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.lower.param_groups[0].get("weight_decay", 0.0) == 0.0
    optimizer.lower.param_groups[0].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: (v - 1).square().sum(), lambda: (v - u).square().sum())


def test_the_upper_rule_may_decay_but_not_climb():
    u, v = pair()
    PenaltyBilevelOptimizer(optim.AdamW([u]), [v])
    with pytest.raises(ValueError, match="return -loss from upper_closure"):
        PenaltyBilevelOptimizer(optim.Adam([u], maximize=True), [v])


def test_a_map_has_no_loss_for_the_decay():
    u, v = pair()
    rule = optim.SGD([v], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="let Phi shrink v"):
        PenaltyBilevelOptimizer([u], rule, penalty="fixed_point")
    with pytest.raises(ValueError, match="let Phi shrink v"):
        HypergradientOptimizer([u], rule, lower_is_map=True)


class Plain(optim.Optimizer):
    """A rule of one's own, whose groups have no learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "kind",
    [
        HypergradientOptimizer,
        PenaltyBilevelOptimizer,
        functools.partial(
            PenaltyBilevelOptimizer, penalty=Stationarity(LeastSquares(correct_lower=True))
        ),
    ],
)
def test_a_rule_without_a_learning_rate_is_as_good(kind):
    """Of both levels: the steps of SGD."""
    ends, scale = [], torch.tensor([1.0, 3.0])
    for rule in (Plain, functools.partial(optim.SGD, lr=0.1)):
        u, v = torch.tensor([0.5], requires_grad=True), torch.tensor([0.2, 0.4], requires_grad=True)
        optimizer = kind(rule([u]), rule([v]))
        for _ in range(20):
            optimizer.step(
                lambda u=u, v=v: (v - 1).square().sum() + u.square().sum(),
                lambda u=u, v=v: (scale * (v - u) ** 2).sum(),
            )
        ends.append(torch.cat([u.detach(), v.detach()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", ["neumann", "reverse"])
def test_methods_that_need_a_learning_rate_say_so(method):
    u, v = torch.tensor([0.5], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    optimizer = HypergradientOptimizer([u], Plain([v]), method=method)
    with pytest.raises(ValueError, match=r'Plain, whose groups have no learning rate.*"lr"'):
        optimizer.step(lambda: (v - 1).square().sum(), lambda: (v - u).square().sum())
    assert v.item() == 0.2
