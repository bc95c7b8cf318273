"""State that a loss keeps: once per step in a module, whoever moves it; named when outside."""

import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer, PenaltyBilevelOptimizer


class Prototypes(nn.Module):
    """A running mean that the loss reads, moved by a method other than forward."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("updates", torch.zeros(()))

    def embed(self, x):
        h = self.lin(x)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.updates += 1
        return h - self.centre

    def forward(self, x):
        return self.embed(x)


def task(engine, call, make=PenaltyBilevelOptimizer, **options):
    torch.manual_seed(0)
    m, x, y = Prototypes(), torch.randn(40, 4), torch.randint(0, 3, (40,))
    u = torch.zeros(32, requires_grad=True)
    fn = m if call == "forward" else m.embed
    optimizer = make([u], m.parameters(), curvature=engine, **options)

    def upper():
        return F.cross_entropy(fn(x[32:]), y[32:])

    def lower():
        return (u.sigmoid() * F.cross_entropy(fn(x[:32]), y[:32], reduction="none")).mean()

    return m, u, x[:32], optimizer, upper, lower


ENGINES = ["auto", "double_backward", "finite_difference"]
MAKES = {
    "penalty": (PenaltyBilevelOptimizer, {}),
    "three lower steps": (PenaltyBilevelOptimizer, {"lower_steps": 3}),
    "paper": (PenaltyBilevelOptimizer, {"penalty": "paper"}),
    "hypergradient": (HypergradientOptimizer, {"method": "cg", "damping": 1.0, "lower_steps": 2}),
}


# The centre follows v under no_grad, so "auto" says that the graph hides a dependence.
@pytest.mark.filterwarnings("ignore:switched to finite differences. they agree to")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", MAKES)
@pytest.mark.parametrize("call", ["forward", "embed"])
def test_a_buffer_moves_once_per_step_by_the_training_batch(call, way, engine):
    make, options = MAKES[way]
    m, _, x, optimizer, upper, lower = task(engine, call, make, **options)
    for step in range(1, 13):  # "auto" compares its engines in the tenth evaluation
        with torch.no_grad():
            expected = 0.9 * m.centre + 0.1 * m.lin(x).mean(0)
        optimizer.step(upper, lower)
        assert int(m.updates) == step
        torch.testing.assert_close(m.centre, expected)


def test_a_method_takes_the_steps_of_forward():
    ends = []
    for call in ("forward", "embed"):
        *_, optimizer, upper, lower = task("double_backward", call)
        losses = [float(optimizer.step(upper, lower)) for _ in range(6)]
        ends.append(losses)
    assert ends[0] == ends[1]


def test_a_self_check_moves_no_buffer():
    m, *_, optimizer, upper, lower = task("auto", "embed")
    optimizer.check_hypergradient(upper, lower, resolve=False)
    assert int(m.updates) == 0
    assert not m.centre.any()


def test_copies_and_pickles_find_modules_anew():
    m, *_, optimizer, upper, lower = task("double_backward", "embed")
    optimizer.step(upper, lower)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin._scope is not optimizer._scope
    assert not twin._scope.knows(upper)
    optimizer.step(upper, lower)
    assert int(m.updates) == 2


HIDDEN = {}


def lookup():
    return globals()["HID" + "DEN"]["net"]


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_that_no_name_leads_to(engine):
    """Found when they run first, also by closures that come later."""
    m, u, x, optimizer, *_ = task(engine, "forward")
    y = torch.zeros(32, dtype=torch.long)
    HIDDEN["net"] = m
    optimizer.step(
        lambda: F.cross_entropy(lookup()(x), y),
        lambda: (u.sigmoid() * F.cross_entropy(lookup()(x), y, reduction="none")).mean(),
    )
    assert int(m.updates) == 1
    optimizer.step(
        lambda: F.cross_entropy(lookup()(-x), y),
        lambda: (u.exp() * F.cross_entropy(lookup()(-x), y, reduction="none")).mean(),
    )
    assert int(m.updates) == 2


def states():
    """Ways to keep a tensor between calls: each a function of the new value, and its name."""
    ema, count = torch.zeros(3), torch.zeros(())
    holder, queue = types.SimpleNamespace(mean=torch.zeros(3)), [torch.zeros(3)]
    rebound = torch.zeros(3)

    def in_place(h):
        ema.mul_(0.9).add_(h, alpha=0.1)
        return ema

    def silent(h):
        count.add_(1)
        return torch.zeros_like(h)

    def attribute(h):
        holder.mean = 0.9 * holder.mean + 0.1 * h
        return holder.mean

    def entry(h):
        queue[0] = 0.9 * queue[0] + 0.1 * h
        return queue[0]

    def variable(h):
        nonlocal rebound
        rebound = 0.9 * rebound + 0.1 * h
        return rebound

    return {
        "ema": in_place,
        "count": silent,
        "holder.mean": attribute,
        "queue[0]": entry,
        "rebound": variable,
    }


def run_with(keep, engine="double_backward", steps=1):
    torch.manual_seed(0)
    lin, x, y = nn.Linear(4, 3), torch.randn(40, 4), torch.randint(0, 3, (40,))
    u = torch.zeros(32, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], lin.parameters(), curvature=engine)

    def lower():
        h = lin(x[:32])
        kept = keep(h.detach().mean(0))
        return (u.sigmoid() * F.cross_entropy(h - kept, y[:32], reduction="none")).mean()

    for _ in range(steps):
        optimizer.step(lambda: F.cross_entropy(lin(x[32:]), y[32:]), lower)


@pytest.mark.parametrize("name", states())
def test_state_of_a_closure_is_named(name):
    with pytest.warns(BilevelWarning, match="register_buffer") as record:
        run_with(states()[name], steps=3)
    assert [f"['{name}']" in str(w.message).replace('"', "'") for w in record] == [True]


def test_logs_and_data_are_no_state():
    """What a closure writes and never reads, or draws anew, is its own business."""
    log, last, batch = [], {"loss": torch.zeros(3)}, torch.zeros(2)

    def keep(h):
        nonlocal batch
        log.append(h)
        last["loss"] = h
        batch = torch.rand(2)
        return torch.zeros_like(h)

    run_with(keep, steps=2)
    assert len(log) > 1
