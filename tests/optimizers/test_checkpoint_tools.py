"""torch's own checkpoint tools keep everything, also on the way into a fresh optimizer."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Inequality

SGD, Adam = torch.optim.SGD, torch.optim.Adam
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)


class Run:
    """One weight per sample of a linear model, both in one module."""

    def __init__(self, kind=PenaltyBilevelOptimizer, rules=None, inequality=False, **options):
        torch.manual_seed(0)
        self.both = nn.Module()
        self.both.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        self.both.u = nn.Parameter(torch.zeros(8))
        self.x, self.y = torch.randn(16, 4), torch.randn(16, 1)
        levels = [self.both.u], self.both.net.parameters()
        if rules is not None:
            levels = [rule(list(p), lr=0.01) for rule, p in zip(rules, levels, strict=True)]
        if inequality:
            options["lower_constraint"] = Inequality(lambda: self.both.net[0].bias - 0.1)
            options["upper_constraint"] = Inequality(lambda: self.both.u - 0.001)
        self.optimizer = kind(*levels, **options)

    def f(self):
        return (self.both.net(self.x[8:]) - self.y[8:]).square().mean()

    def g(self):
        each = (self.both.net(self.x[:8]) - self.y[:8]).square().squeeze(1)
        decay = sum(p.square().sum() for p in self.both.net.parameters())
        return (self.both.u.exp() * each).mean() + 0.1 * decay

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(self.f, self.g)
        return self

    def point(self):
        return torch.cat([p.detach().flatten() for p in self.both.parameters()])

    def saved(self, options=None):
        return copy.deepcopy(get_state_dict(self.both, self.optimizer, options=options))

    def load(self, saved, options=None):
        model, optim = copy.deepcopy(saved)
        set_state_dict(
            self.both,
            self.optimizer,
            model_state_dict=model,
            optim_state_dict=optim,
            options=options,
        )
        return self


MAKINGS = {
    "default": {},
    "paper": {"penalty": "paper", "lower_steps": 2},
    "value": {"penalty": "value"},
    "value, momentum": {"penalty": "value", "rules": (Adam, lambda p, lr: SGD(p, lr, 0.9))},
    "plain SGD": {"rules": (SGD, SGD)},
    "plain SGD above": {"rules": (SGD, Adam)},
    "Adagrad above": {"rules": (torch.optim.Adagrad, Adam)},
    "cg": {"kind": HypergradientOptimizer, "damping": 1.0},
    "cold start": {"kind": HypergradientOptimizer, "method": "neumann", "warm_start": False},
}


def equal(one, other):
    assert torch.equal(one.point(), other.point())
    for a, b in zip(one.optimizer.adjoint, other.optimizer.adjoint, strict=True):
        assert torch.equal(a, b)
    assert (
        one.optimizer.metrics.gradient_evaluations == other.optimizer.metrics.gradient_evaluations
    )


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("form", [None, FLAT, FULL], ids=["nested", "flat", "full"])
@pytest.mark.parametrize("making", MAKINGS)
def test_round_trip_is_bit_equal(making, form, before):
    """Into a fresh optimizer, and into one that has gone elsewhere."""
    if making == "cold start" and form is FLAT and before == 0:
        pytest.skip("refused, see below")
    whole = Run(**MAKINGS[making]).steps(5)
    saved = whole.saved(form)
    resumed = Run(**MAKINGS[making]).steps(before).load(saved, form)
    equal(whole.steps(4), resumed.steps(4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("making", ["default", "value", "cg"])
def test_through_a_file(tmp_path, making):
    """What dcp reads into is the state of a fresh optimizer."""
    whole = Run(**MAKINGS[making]).steps(5)
    model, optim = whole.saved()
    dcp.save({"model": model, "optim": optim}, checkpoint_id=tmp_path, no_dist=True)
    resumed = Run(**MAKINGS[making])
    model, optim = resumed.saved()
    held = {"model": model, "optim": optim}
    dcp.load(held, checkpoint_id=tmp_path, no_dist=True)
    resumed.load((held["model"], held["optim"]))
    equal(whole.steps(4), resumed.steps(4))


@pytest.mark.parametrize("form", [None, FLAT, FULL], ids=["nested", "flat", "full"])
def test_inequality_multipliers_travel(form):
    whole = Run(inequality=True, upper_lr=0.01, lower_lr=0.01).steps(5)
    mu = whole.optimizer.inequality_multipliers
    assert all(float(mu[level][0].max()) > 0 for level in ("upper", "lower"))
    resumed = Run(inequality=True, upper_lr=0.01, lower_lr=0.01).load(whole.saved(form), form)
    for level in ("upper", "lower"):
        assert torch.equal(mu[level][0], resumed.optimizer.inequality_multipliers[level][0])
    equal(whole.steps(4), resumed.steps(4))


def test_what_a_flat_checkpoint_cannot_bring_to_a_fresh_optimizer_is_refused():
    making = MAKINGS["cold start"]
    saved = Run(**making).steps(3).saved(FLAT)
    with pytest.raises(ValueError, match=r"first_lower lacks .* take a step with that"):
        Run(**making).load(saved, FLAT)


def test_entries_that_are_missing_are_refused():
    run = Run().steps(2)
    before = run.point()
    state = copy.deepcopy(run.optimizer.state_dict())
    del state["state"][2]["bilevel_multiplier"]
    with pytest.raises(ValueError, match="multiplier lacks that of lower parameter 1"):
        run.optimizer.load_state_dict(state)
    short = copy.deepcopy(run.optimizer.state_dict())
    short["param_groups"][1]["bilevel"]["lengths"]["multiplier"] = 7
    with pytest.raises(ValueError, match="has 4 of 7 entries"):
        run.optimizer.load_state_dict(short)
    assert torch.equal(run.point(), before)


def test_a_parameter_without_state_has_an_entry():
    """Torch's tools refuse a checkpoint without one."""
    run = Run(**MAKINGS["plain SGD above"]).steps(2)
    run.optimizer.upper.state.clear()
    resumed = Run(**MAKINGS["plain SGD above"]).load(run.saved())
    assert not resumed.optimizer.upper.state.get(resumed.both.u)
    equal(run.steps(2), resumed.steps(2))


def test_a_frozen_parameter_keeps_its_own():
    """Torch's tools drop the state of what does not require grad."""
    whole, resumed = Run(), Run()
    for run in (whole, resumed):
        run.both.net[0].bias.requires_grad_(False)
    resumed.load(whole.steps(3).saved())
    equal(whole.steps(3), resumed.steps(3))


def test_memory_lies_beside_the_moments():
    run = Run().steps(2)
    state = get_optimizer_state_dict(run.both, run.optimizer)
    assert list(state) == ["state", "param_groups"]
    entry = state["state"]["net.2.weight"]
    assert entry.keys() >= {"exp_avg", "bilevel_multiplier", "bilevel_probe", "bilevel_adjoint"}
    assert torch.equal(entry["bilevel_adjoint"], run.optimizer.adjoint[2])
    live = run.optimizer.state[run.both.net[2].weight]
    assert torch.equal(live["bilevel_adjoint"], run.optimizer.adjoint[2])
    assert "bilevel_adjoint" not in run.optimizer.lower.state[run.both.net[2].weight]
    assert run.optimizer.param_groups[1]["bilevel"] == {}  # filled where a state dict is taken


def test_reading_the_state_of_a_fresh_optimizer_moves_nothing():
    run = Run()
    before = run.point()
    get_state_dict(run.both, run.optimizer)
    assert torch.equal(run.point(), before)
    assert run.optimizer.param_groups[0]["lr"] == 1e-3
    with pytest.raises(TypeError, match="needs two closures"):
        run.optimizer.step()


def earlier_format(optimizer):
    """What ``state_dict`` returned before: the memory as one dict beside the rules' state."""
    state, own = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer._own_state())
    for group in state["param_groups"]:
        group.pop("bilevel", None)
    entries = {
        key: {k: v for k, v in entry.items() if not k.startswith("bilevel_")}
        for key, entry in state["state"].items()
    }
    state["state"] = {key: entry for key, entry in entries.items() if entry}
    return state | {"bilevel": own | {"format": 1}}


@pytest.mark.parametrize("making", MAKINGS)
def test_checkpoints_of_the_earlier_format_load(making):
    whole = Run(**MAKINGS[making]).steps(5)
    file = io.BytesIO()
    torch.save((whole.both.state_dict(), earlier_format(whole.optimizer)), file)
    file.seek(0)
    model, optim = torch.load(file, weights_only=True)
    resumed = Run(**MAKINGS[making]).steps(1)
    resumed.both.load_state_dict(model)
    resumed.optimizer.load_state_dict(optim)
    equal(whole.steps(4), resumed.steps(4))


PASSED_ON = {
    "closure=": lambda o, f, g: o.step(closure=f, lower_closure=g),
    "pair": lambda o, f, g: o.step((f, g)),
    "list": lambda o, f, g: o.step([f, g]),
    "closure=pair": lambda o, f, g: o.step(closure=(f, g)),
    "keywords": lambda o, f, g: o.step(upper_closure=f, lower_closure=g),
}


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
@pytest.mark.parametrize("way", PASSED_ON)
def test_step_takes_what_trainers_pass_on(way, kind):
    options = {} if kind is PenaltyBilevelOptimizer else {"damping": 1.0}
    plain, passed = Run(kind, **options).steps(3), Run(kind, **options)
    for _ in range(3):
        PASSED_ON[way](passed.optimizer, passed.f, passed.g)
    equal(plain, passed)


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_what_one_level_trainers_call_is_refused(kind):
    run = Run(kind).steps(0)
    step, f, g = run.optimizer.step, run.f, run.g
    told = r"needs two closures.*Lightning .*closure=f, lower_closure=g.*Accelerate .*\(\(f, g\)\)"
    for call in (
        lambda: step(),
        lambda: step(None),
        lambda: step(closure=None),
        lambda: step(f),
        lambda: step(closure=f),
        lambda: step((f, g, g)),
        lambda: step([f]),
    ):
        with pytest.raises(TypeError, match=told):
            call()
    with pytest.raises(TypeError, match="give one of them"):
        step(f, closure=f, lower_closure=g)
