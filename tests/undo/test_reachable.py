"""Every way in which the code of a closure can name a module or a tensor."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
from torch import nn

from torch_penalty_bilevel.undo import reachable
from torch_penalty_bilevel.undo.reachable import code_of, reached_by

NET = nn.Linear(2, 2)
SHELF = types.SimpleNamespace(inner=types.SimpleNamespace(net=NET), other=nn.Linear(1, 1))
LIBRARY = types.ModuleType("library_of_the_user")
LIBRARY.net = NET  # type: ignore[attr-defined]


def loss(net=None):
    return (net or NET).weight.sum()


class Trainer:
    kept = NET

    def __init__(self, net=None):
        self.net = net
        self.unused = nn.Linear(3, 3)

    def through_attribute(self):
        return self.net.weight.sum()

    def through_method(self):
        return self.through_attribute()

    def through_class(self):
        return self.kept.weight.sum()

    @property
    def model(self):
        return self.net

    def through_property(self):
        return self.model.weight.sum()

    @staticmethod
    def fixed():
        return NET.weight.sum()

    def through_static(self):
        return self.fixed()

    def __call__(self):
        return self.net.weight.sum()


@dataclasses.dataclass(slots=True)
class Slotted:
    net: nn.Module
    unused: nn.Module


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = NET

    def own_loss(self):
        return self.net.weight.sum()


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


REGISTRY = {}


def registered(function):
    """Found again by a name that no code says: what it wraps is all there is to follow."""
    REGISTRY["loss"] = function

    @functools.wraps(function)
    def wrapper(*args):
        return globals()["REG" + "ISTRY"]["loss"](*args)

    return wrapper


def by_keyword(*, net=NET):
    return net.weight.sum()


def nested():
    def inner():
        return [NET.weight for _ in range(1)]

    return inner()


def cell(net):
    return lambda: net.weight.sum()


def pair(nets):
    return lambda: nets["a"][0].weight.sum()


def slotted(held):
    return lambda: held.net.weight.sum()


def captured(trainer):
    return lambda: trainer.through_method()


CASES = {
    "global": lambda: NET.weight.sum(),
    "a global's attribute's attribute": lambda: SHELF.inner.net.weight.sum(),
    "attribute of a Python module": lambda: LIBRARY.net.weight.sum(),
    "function called": lambda: loss(),
    "nested function": nested,
    "closure cell": cell(NET),
    "container": pair({"a": (NET,)}),
    "default": lambda net=NET: net.weight.sum(),
    "keyword default": by_keyword,
    "wrapped and registered": registered(cell(NET)),
    "partial": functools.partial(loss, NET),
    "partial by name": functools.partial(loss, net=NET),
    "decorated": decorated(cell(NET)),
    "bound method": Trainer(NET).through_attribute,
    "method of a method": Trainer(NET).through_method,
    "captured object": captured(Trainer(NET)),
    "class attribute": Trainer().through_class,
    "property": Trainer(NET).through_property,
    "static method": Trainer().through_static,
    "callable object": Trainer(NET),
    "slots": slotted(Slotted(NET, nn.Linear(1, 1))),
    "method of a module": Bank().own_loss,
    "compiled function": torch.compile(cell(NET), backend="eager"),
    "compiled module": cell(torch.compile(NET, backend="eager")),
    "compiled method": torch.compile(Trainer(NET).through_method, backend="eager"),
    "disabled function": torch.compiler.disable(cell(NET)),
}


@pytest.mark.parametrize("case", CASES)
def test_finds_the_module_and_no_other(case):
    roots = reached_by(CASES[case]).modules
    assert any(NET in root.modules() for root in roots)
    # Trainer.unused, Slotted.unused and SHELF.other are not named by the code.
    assert all(NET in root.modules() for root in roots)


def test_ends_on_cycles_and_unassigned_cells():
    first, second = types.SimpleNamespace(), types.SimpleNamespace()
    first.net, second.net = second, first

    def closure():
        return later, first.net, network

    network = NET
    assert reached_by(closure).modules == [NET]
    later = nn.Linear(1, 1)


def test_long_containers_hold_data():
    many = [nn.Identity() for _ in range(200)]
    by_name = {str(i): net for i, net in enumerate(many)}
    assert reached_by(lambda: (many, by_name)).modules == []


def test_a_search_that_gets_lost_ends():
    deep = NET
    for _ in range(1500):
        deep = [deep]
    assert reached_by(lambda: deep).modules == []


def test_the_package_of_the_closure_may_be_installed():
    closure, helper = cell(NET), lambda: NET.weight.sum()
    closure.__module__ = "pytest.helpers"
    helper.__module__ = "a_package_of_ones_own"
    assert reached_by(closure).modules == [NET]
    assert reached_by(lambda: helper()).modules == [NET]  # which nobody installed
    helper.__module__ = "pytest.helpers"
    assert reached_by(lambda: helper()).modules == []


def installed_trainer():
    """A class, one of its methods and a function beside it, of an installed package."""

    def helper():
        return NET.weight.sum()

    def weigh(self):
        return helper()

    helper.__module__ = weigh.__module__ = "pytest.helpers"
    return type("Trainer", (), {"weigh": weigh, "__module__": "pytest.helpers"})()


def test_methods_and_partials_are_at_home_in_the_package_of_their_function():
    trainer = installed_trainer()
    assert reached_by(trainer.weigh).modules == [NET]
    assert reached_by(functools.partial(type(trainer).weigh, trainer)).modules == [NET]
    assert reached_by(functools.partial(functools.partial(trainer.weigh))).modules == [NET]
    assert reached_by(lambda: trainer.weigh()).modules == []  # another's


def test_a_library_is_no_home():
    inner = cell(NET)
    inner.__module__ = "torch.nn.modules.module"
    assert reached_by(inner).modules == []
    other = nn.Linear(3, 3)
    assert reached_by(other.__call__).modules == [other]
    searched = reachable._Search(reachable._home(Trainer(NET).through_attribute))
    searched.run(Trainer(NET).through_attribute, "closure")
    assert not any(holder is vars(object) for _, holder in searched._holders)


def test_compiled_parts_of_modules_are_seen():
    net = nn.Sequential(nn.Linear(2, 2))
    assert not reached_by(cell(net)).compiled
    net[0].compile(backend="eager")
    assert reached_by(cell(net)).compiled


@pytest.mark.parametrize("case", CASES)
def test_what_is_compiled_is_said_to_be(case):
    wrapped = case.startswith(("compiled", "disabled"))
    assert reached_by(CASES[case]).compiled is wrapped


def test_a_name_means_what_was_found_last():
    box, two = types.SimpleNamespace(x=torch.ones(1)), torch.ones(2)

    def closure(x=two):
        return x, box.x

    closure.__name__ = "box"
    found = reached_by(closure).tensors
    assert list(found) == ["box[0]", "box.x"]
    closure.__kwdefaults__ = {0: torch.ones(3)}  # by a name that the first default has
    assert [t.numel() for t in reached_by(closure).tensors.values()] == [3, 1]


def test_names_of_tensors():
    history, holder, batch = [torch.ones(1)], types.SimpleNamespace(mean=torch.ones(2)), {}
    batch["x"] = torch.ones(3)
    centre = torch.ones(4)
    tensors = reached_by(lambda: (history, holder.mean, batch, centre)).tensors
    assert {name: t.numel() for name, t in tensors.items()} == {
        "history[0]": 1,
        "holder.mean": 2,
        "batch['x']": 3,
        "centre": 4,
    }


def test_code_is_that_of_the_line_and_not_of_the_wrapper():
    inner = cell(NET)
    for wrapped in (
        inner,
        functools.partial(inner),
        torch.compile(inner, backend="eager"),
        cell(nn.Linear(1, 1)),
    ):
        assert code_of(wrapped) is inner.__code__
    assert code_of(Trainer(NET)) is Trainer.__call__.__code__
    assert code_of(Trainer(NET).through_method) is Trainer.through_method.__code__
    assert code_of(functools.partial(Trainer(NET))) is Trainer.__call__.__code__
    assert code_of(len) is None
