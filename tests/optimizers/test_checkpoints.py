"""Checkpoints, copies and pickles go on bit-equally, or are refused whole."""

import copy
import io
import pathlib
import pickle

import pytest
import torch
from tasks import Task
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves

from torch_penalty_bilevel import PenaltyBilevelOptimizer


@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_resume_is_bit_equal(at, penalty):
    whole = Task(penalty=penalty, lower_steps=2).run(at)
    file = io.BytesIO()
    torch.save({"net": whole.net.state_dict(), "o": whole.optimizer.state_dict()}, file)
    kept = whole.weights.detach().clone()
    whole.run(9)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Task(penalty=penalty, lower_steps=2)
    resumed.run(2)  # a state that must be overwritten, not merged
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["o"])
    with torch.no_grad():
        resumed.weights.copy_(kept)
    resumed.run(9)
    assert torch.equal(whole.point(), resumed.point())
    for a, b in zip(whole.optimizer.adjoint, resumed.optimizer.adjoint, strict=True):
        assert torch.equal(a, b)
    mine, theirs = (vars(task.optimizer.metrics).values() for task in (whole, resumed))
    for x, y in zip(mine, theirs, strict=True):
        # NaN, where the rule makes no correction, is NaN again.
        torch.testing.assert_close(
            torch.as_tensor(x), torch.as_tensor(y), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_resume_is_bit_equal_with_dropout(curvature):
    """The one-time checks of a fresh optimizer must not draw from the generators."""

    def build():
        task = Task()
        task.net.append(nn.Dropout(0.3))
        task.optimizer = PenaltyBilevelOptimizer(
            [task.weights], task.net.parameters(), curvature=curvature
        )
        return task

    whole = build().run(3)
    resumed = build()
    resumed.net.load_state_dict(copy.deepcopy(whole.net.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    with torch.no_grad():
        resumed.weights.copy_(whole.weights)
    ends = []
    for task in (whole, resumed):
        torch.manual_seed(7)
        ends.append(task.run(3).point())
    assert torch.equal(*ends)


@pytest.mark.parametrize("penalty", ["stationarity", "value"])
def test_loading_does_not_alias_the_checkpoint(penalty):
    state = Task(penalty=penalty).run(3).optimizer.state_dict()

    def own():  # as torch has it, the moments of both rules are taken over as they are
        entries = [e for e in state["state"].values() if "bilevel_multiplier" in e]
        return tree_leaves([[v for k, v in e.items() if "bilevel" in k] for e in entries])

    held = copy.deepcopy(own())
    other = Task(penalty=penalty)
    other.optimizer.load_state_dict(state)
    other.run(3)
    assert len(held) > 4
    for a, b in zip(own(), held, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_taking_a_checkpoint_changes_nothing_of_a_fresh_optimizer():
    """Torch's tools take a step for the state where there is none; it must still look so."""
    task = Task()
    task.optimizer.state_dict()
    assert not task.optimizer.state


def test_moments_that_are_not_shaped_like_their_parameter_load():
    task = Task()
    factored = torch.optim.Adafactor(task.net.parameters(), lr=0.02)
    task.optimizer = PenaltyBilevelOptimizer([task.weights], factored, upper_lr=0.05)
    state = copy.deepcopy(task.run(2).optimizer.state_dict())
    assert state["state"][1]["row_var"].shape != task.net[0].weight.shape
    task.run(2).optimizer.load_state_dict(state)
    after = task.optimizer.state_dict()["state"][1]
    for key, value in state["state"][1].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])), key


def test_rules_and_whole_share_state_after_loading():
    task = Task().run(3)
    task.optimizer.load_state_dict(copy.deepcopy(task.optimizer.state_dict()))
    assert task.optimizer.param_groups[1] is task.optimizer.lower.param_groups[0]
    task.optimizer.param_groups[1]["lr"] = 0.0
    before = task.point()[8:]
    task.run(1)
    assert torch.equal(task.point()[8:], before)


def test_a_rule_that_reloads_its_own_state_stays_joined():
    task = Task().run(3)
    state = copy.deepcopy(task.optimizer.upper.state_dict())
    task.optimizer.upper.load_state_dict(state)
    task.run(1)
    assert len(task.optimizer.state) == 5
    assert task.optimizer.state[task.weights] is task.optimizer.upper.state[task.weights]
    assert task.optimizer.param_groups[0] is task.optimizer.upper.param_groups[0]


def test_checkpoints_that_do_not_fit_change_nothing():
    task = Task().run(2)
    good = copy.deepcopy(task.optimizer.state_dict())
    paper = Task(penalty="paper").optimizer.state_dict()
    wrong_shape = copy.deepcopy(good)
    wrong_shape["state"][1]["bilevel_multiplier"] = torch.zeros(1)
    wrong_level = copy.deepcopy(good)
    wrong_level["param_groups"][0]["level"] = "lower"
    for bad, message in (
        (task.optimizer.upper.state_dict(), "no 'bilevel' entry"),
        (wrong_shape, "multiplier has shapes"),
        (wrong_level, "levels"),
        (paper, "this rule needs"),
    ):
        with pytest.raises(ValueError, match=message):
            task.optimizer.load_state_dict(bad)
    twin = Task().run(2)
    assert torch.equal(task.run(3).point(), twin.run(3).point())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_continue_bit_equally_and_independently(duplicate):
    task = Task().run(4)
    twin = duplicate(task)
    assert twin.optimizer.lower is not task.optimizer.lower
    assert twin.optimizer.upper.param_groups[0]["params"][0] is twin.weights
    assert torch.equal(task.run(6).point(), twin.run(6).point())
    before = task.point()
    twin.run(1)
    assert torch.equal(task.point(), before)


def test_a_scheduled_optimizer_can_be_copied():
    """Schedulers wrap ``step`` on the instance; the wrapper must not travel."""
    task = Task()
    lr_scheduler.ExponentialLR(task.optimizer, 0.9)
    task.run(2)
    twin = copy.deepcopy(task)
    assert torch.equal(task.run(2).point(), twin.run(2).point())


def test_switched_engine_survives_a_checkpoint():
    task = Task()
    task.optimizer.curvature.switch()
    state = task.run(2).optimizer.state_dict()
    other = Task()
    assert not other.optimizer.curvature.switched
    other.optimizer.load_state_dict(copy.deepcopy(state))
    assert other.optimizer.curvature.switched


@pytest.mark.parametrize("penalty", ["stationarity", "value"])
def test_a_file_of_the_earlier_format_loads(penalty):
    """Written before the memory moved into ``state`` and ``param_groups``."""
    file = pathlib.Path(__file__).parents[1] / "data" / "earlier_format.pt"
    saved = torch.load(file, weights_only=True)[penalty]
    task = Task(penalty=penalty).run(1)
    task.net.load_state_dict(saved["net"])
    task.optimizer.load_state_dict(saved["optimizer"])
    then, now = saved["optimizer"]["bilevel"], task.optimizer._own_state()
    for name in ("multiplier", "adjoint", "probe", "tracker"):
        pairs = zip(then[name], now.get(name, []), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for old, new in zip(then["moments"], now.get("moments", []), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    then["scalars"].pop("first_weight", None)  # of a cap that is gone
    assert then["scalars"].items() <= now["scalars"].items()
    assert [now[k] for k in ("steps", "lower_steps")] == [3, 3]
    assert task.optimizer.state[task.weights]["step"] == 3
    task.run(2)
