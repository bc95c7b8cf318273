"""Step hooks that raise on one process only."""

import copy

import torch
from shards import Sharded, cg_over
from sharing import Shared
from trouble import everything, outcome

from torch_penalty_bilevel import HypergradientOptimizer

PLACES = [(owner, when) for owner in ("optimizer", "lower", "upper") for when in ("pre", "post")]
KINDS = [("stationarity", 1), ("stationarity", 3), ("paper", 1), ("value", 1), ("cg", 2)]
HALVES = ("lower_step", "upper_step", "plain_lower_step")


def register(optimizer, owner, when, hook):
    """The hook, at ``optimizer`` or one of its rules."""
    rule = optimizer if owner == "optimizer" else getattr(optimizer, owner)
    return getattr(rule, f"register_step_{when}_hook")(hook)


def fails(*_):
    raise ZeroDivisionError("of this rank alone")


def halves(rule, *_):
    for parameter in rule.param_groups[0]["params"]:
        parameter.grad *= 0.5


def act(shared, name):
    """A step, or a half of one."""
    losses = [shared.g] if name == "plain_lower_step" else [shared.f, shared.g]
    return outcome(lambda: getattr(shared.optimizer, name)(*losses))


def one_case(shared, rank, owner, when, name="step", hook=fails):
    """A good step, one with the hook, one without it, and one from where the first had led."""
    said = [act(shared, "step")]
    before = everything(shared)
    parameters = [shared.samples, shared.decay, *shared.net.parameters()]
    values = [p.detach().clone() for p in parameters]
    saved = copy.deepcopy(shared.optimizer.state_dict())
    if rank == 1:
        handle = register(shared.optimizer, owner, when, hook)
    said.append(act(shared, name))
    unchanged = torch.equal(everything(shared), before)
    if rank == 1:
        handle.remove()
    said.append(act(shared, "step"))
    after = everything(shared)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    shared.optimizer.load_state_dict(saved)
    said.append(act(shared, "step"))
    return {"said": said, "unchanged": unchanged, "after": after, "again": everything(shared)}


def raised_in_hooks(rank, world):
    """By (kind, lower steps, owner, when), what this rank saw."""
    found = {}
    for kind, steps in KINDS:
        for owner, when in PLACES:
            shared = Shared(kind, "auto", rank, world)
            shared.optimizer.lower_steps = steps
            found[kind, steps, owner, when] = one_case(shared, rank, owner, when)
    for name in HALVES:
        shared = Shared("stationarity", "auto", rank, world)
        owner = "upper" if name == "upper_step" else "lower"
        found[name, 1, owner, "pre"] = one_case(shared, rank, owner, "pre", name)
    return found


def going_back(rank, world):
    """Reverse mode, whose lower steps are looked at: a hook that raises, one that changes them."""
    found = {}
    for name, hook in (("raises", fails), ("halves", halves)):
        shared = Shared("cg", "auto", rank, world)
        levels = [shared.samples, shared.decay], shared.net.parameters()
        options = {"method": "reverse", "lower_steps": 3, "lower_lr": 0.02, "reduce": "mean"}
        shared.optimizer = HypergradientOptimizer(*levels, **options)
        found[name] = one_case(shared, rank, "lower", "pre", hook=hook)
    return found


def raised_beside_shards(rank, world):
    """A good step, one whose hook raises before a later forward pass, one without it."""
    found = {}
    for kind in ("stationarity", "cg"):
        for owner in ("optimizer", "lower"):
            shared = Sharded("stationarity", rank, world)
            if kind == "cg":
                shared.optimizer = cg_over(shared)
            shared.draw(0)
            shared.optimizer.lower_steps = 3
            said = [act(shared, "step")]
            if rank == 1:
                handle = register(shared.optimizer, owner, "pre", fails)
            said.append(act(shared, "step"))
            if rank == 1:
                handle.remove()
            said.append(act(shared, "step"))
            found[kind, owner] = said
    return found
