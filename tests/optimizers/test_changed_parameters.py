"""Parameters that are others than at construction, or listed twice: said by name."""

import copy

import pytest
import torch
from tasks import Task

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

KINDS = [PenaltyBilevelOptimizer, HypergradientOptimizer]
OPTIONS = {PenaltyBilevelOptimizer: {}, HypergradientOptimizer: {"damping": 5.0}}


def made(kind, **rules):
    task = Task()
    upper, lower = [("w", task.weights)], list(task.net.named_parameters())
    task.optimizer = kind(upper, rules.get("lower", lower), **OPTIONS[kind])
    return task


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_shortened_group(kind, steps):
    task = made(kind).run(steps)
    group = task.optimizer.param_groups[1]
    everything = group["params"]
    group["params"], names = everything[:2], group["param_names"]
    group["param_names"] = names[:2]
    before = task.point()
    with pytest.raises(ValueError, match=r"lower hold 2 parameters and held 4 .*freeze it"):
        task.optimizer.step(task.upper, task.lower)
    assert torch.equal(task.point(), before)
    group["params"], group["param_names"] = everything, names
    task.optimizer.step(task.upper, task.lower)


@pytest.mark.parametrize("kind", KINDS)
def test_one_parameter_twice_in_a_level(kind):
    net = Task().net
    u, first = torch.zeros(8, requires_grad=True), net[0].weight
    rule = torch.optim.Adam(net.parameters())
    rule.param_groups[0]["params"].append(first)
    with pytest.raises(ValueError, match=r"'lower\[0\]' and as 'lower\[4\]'; list it once") as e:
        kind([u], rule)
    assert "clone" not in str(e.value)
    kind([u], list(dict.fromkeys([*net.parameters(), first])))


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_named_with_the_remedy(kind):
    task = made(kind).run(2)
    task.net.float()
    task.x, task.y = task.x.float(), task.y.float()
    with pytest.raises(ValueError, match=r"'0.weight' was a tensor of \(4, 3\) torch.float64") as e:
        task.run(2)
    assert "torch.float32 on cpu" in str(e.value)
    assert "before the optimizer is built" in str(e.value)
    assert isinstance(e.value.__cause__, RuntimeError)


def test_a_group_added_later_is_known_too():
    task = made(PenaltyBilevelOptimizer).run(1)
    late = torch.zeros(2, requires_grad=True)
    task.optimizer.add_param_group({"params": [("late", late)], "level": "lower"})
    lower = task.lower
    task.lower = lambda: lower() + (late - 1).square().sum().double()
    task.run(1)
    late.data = late.data.float()
    with pytest.raises(ValueError, match="'late' was a tensor of"):
        task.run(1)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_other_causes_stay_what_they_are(kind):
    task = made(kind).run(1)

    def fails():
        raise RuntimeError("mine")

    for optimizer in (task.optimizer, copy.deepcopy(task.optimizer)):
        with pytest.raises(RuntimeError, match=r"^mine$"):
            optimizer.step(fails, task.lower)


def test_a_change_that_does_no_harm_is_none():
    """Before the first step nothing is remembered that would not fit."""
    task = made(HypergradientOptimizer)
    task.net.float()
    task.x, task.y = task.x.float(), task.y.float()
    before = task.point()
    task.run(2)
    assert all(p.dtype == torch.float32 for p in task.net.parameters())
    assert (task.point() != before).any()
