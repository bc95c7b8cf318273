"""Whatever happens on one process, all of them go on or all of them raise."""

import os

import pytest
import torch
import trouble
from sharing import Shared, on_processes

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """By function of ``trouble``, what both ranks saw."""
    both = on_processes(2, tmp_path_factory.mktemp("processes") / "two", trouble.all_of_them)
    return {name: (both[0][name], both[1][name]) for name in both[0]}


def test_a_closure_that_raises_on_one_raises_on_all(seen):
    """In its n-th call, under every penalty and engine; the next step then works."""
    failed = 0
    first, second = seen["raised_calls"]
    for case, (errors, unchanged, after, state) in first.items():
        others, also_unchanged, also_after, other_state = second[case]
        assert unchanged, case
        assert also_unchanged, case
        assert after == also_after == "fine", case
        assert torch.equal(state, other_state), case
        expected = ["WorkerError" if error != "fine" else "fine" for error in others]
        assert errors == expected, case
        assert set(others) <= {"ZeroDivisionError", "fine"}
        failed += others != ["fine", "fine"]
    assert failed >= 40


def test_what_is_not_finite_on_one_is_so_on_all(seen):
    first, second = (each["infinite"] for each in seen["other_troubles"])
    assert first == second
    assert first[0] == "NonFiniteError"
    assert first[1].startswith("upper loss f")


def test_other_data_on_one_rank_stop_all(seen):
    kinds = [each["other data"][0] for each in seen["other_troubles"]]
    assert kinds == ["WorkerError", "NondeterministicClosureError"]


def test_an_unused_parameter_is_unused_everywhere(seen):
    for each in seen["other_troubles"]:
        assert each["unused"][0] == "UnusedParameterError"
        assert "upper[2]" in each["unused"][1]
        assert each["unused, allowed"] == ("fine", "")
        assert each["unused, allowed: grad"] is None


def test_a_parameter_of_one_rank_follows_its_part_of_the_mean(seen):
    torch.set_default_dtype(torch.float64)
    alone = trouble.on_one_rank(None)
    for each in seen["other_troubles"]:
        torch.testing.assert_close(each["on one rank"], alone, rtol=1e-12, atol=1e-12)


def test_another_start_on_one_rank_is_an_error(seen):
    for each in seen["other_troubles"]:
        kind, words = each["other start"]
        assert kind == "ValueError"
        assert words.startswith("the parameters ['samples'] are not the same on all processes")


def test_the_engine_is_one_for_all(seen):
    first, second = seen["other_troubles"]
    assert first["engine"]
    assert second["engine"]
    assert any("another worker had to" in line for line in first["engine says"])
    assert any("Hidden" in line for line in second["engine says"])


def test_an_evaluation_sends_one_message(seen):
    """r, H q, grad_v f; the upper gradient; two losses, who uses what, the ballot; then the end."""
    n = 26
    for each in seen["other_troubles"]:
        assert each["numbers"] == n
        assert each["sent"] == [3 * n + 13 + 2 + 2 + 2, 1]


def test_ranks_decide_as_one_process_would(seen):
    """How many lower steps, a warm-up, a new start; a check; bounds and inequalities."""
    alone = trouble.decisions(0, 1)
    first, second = seen["decisions"]
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10)


def test_wrapped_modules_stay_what_they_are(seen):
    """DDP with BatchNorm, between ordinary steps: no hook, broadcast or flag is in the way."""
    first, second = seen["with_statistics"]
    assert first["said"] == ["fine", "fine", "WorkerError", "fine"]
    assert second["said"] == ["fine", "fine", "ZeroDivisionError", "fine"]
    for each in (first, second):
        assert each["flags"] == (True, True)
        assert each["engine"] == "torch has all second derivatives"
        assert each["batches"] == 7  # three steps that succeeded, four ordinary ones
    assert torch.equal(first["lower"], second["lower"])


def test_strangers_are_warned_of_once(seen):
    for (alone, meant), own_group in seen["strangers"]:
        [(category, message, where)] = alone
        assert category == "UserWarning"
        assert 'reduce="mean"' in message
        assert os.path.basename(where) == "trouble.py"
        assert meant == []
        assert own_group


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_bad_arguments_are_named(kind):
    u, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"reduce must be .* 'median'"):
        kind([u], [v], reduce="median")
    with pytest.raises(TypeError, match=r"reduce must be .* 3"):
        kind([u], [v], reduce=3)
    with pytest.raises(ValueError, match='process_group is for reduce="mean"'):
        kind([u], [v], process_group=object())


def test_processes_that_have_not_met(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = Shared("stationarity", "auto")
    optimizer = PenaltyBilevelOptimizer(
        [shared.samples, shared.decay], shared.net.parameters(), reduce="mean"
    )
    with pytest.raises(RuntimeError, match="init_process_group"):
        optimizer.step(shared.f, shared.g)


def test_mean_of_one_process_is_nothing_at_all():
    """The same script without torchrun."""
    ends = []
    for options in ({}, {"reduce": "mean"}):
        shared = Shared("stationarity", "auto")
        optimizer = PenaltyBilevelOptimizer(
            [shared.samples, shared.decay], shared.net.parameters(), **options
        )
        for _ in range(3):
            optimizer.step(shared.f, shared.g)
        ends.append(shared.samples.detach().clone())
    assert torch.equal(*ends)
