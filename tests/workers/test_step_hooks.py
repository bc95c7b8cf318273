"""A step hook that raises on one process: the others hear of it in the same step."""

import pytest
import raising_hooks
import torch
from sharing import on_processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "two"
    return on_processes(2, folder, raising_hooks.raised_in_hooks)


def test_all_hear_of_a_hook_that_raises_on_one(seen):
    """But of one after the whole step: all have moved alike by then."""
    for case, here in seen[1].items():
        other, after_the_step = seen[0][case], case[2:] == ("optimizer", "post")
        assert here["said"][1][0] == "ZeroDivisionError", case
        assert other["said"][1][0] == ("fine" if after_the_step else "WorkerError"), case
        assert [pair[0] for pair in (here["said"][0], other["said"][0])] == ["fine"] * 2, case


def test_nothing_has_changed_where_it_says_so(seen):
    said = set()
    for case, here in seen[1].items():
        other = seen[0][case]
        words = other["said"][1][1]
        if "nothing was changed" in words:
            said.add(case)
            assert here["unchanged"], case
            assert other["unchanged"], case
        elif other["said"][1][0] == "WorkerError":
            assert "may not be the same on all workers now" in words, case
    at_first = {case for case in seen[0] if case[2:] == ("optimizer", "pre")}
    # Before another evaluation, which "paper" makes for u alone.
    between = {c for c in seen[0] if c[2] == "lower" and (c[1] > 1 or c[0] == "paper")}
    assert said == at_first | between


def test_the_next_step_goes_on_alike_or_stops_alike(seen):
    """What differs by then is named; from a checkpoint all go on."""
    stopped = 0
    for case, here in seen[1].items():
        other = seen[0][case]
        assert here["said"][2] == other["said"][2], case
        if here["said"][2][0] == "fine":
            assert torch.equal(here["after"], other["after"]), case
        else:
            assert "are not the same on all processes" in here["said"][2][1], case
            stopped += 1
        assert here["said"][3][0] == other["said"][3][0] == "fine", case
        assert torch.equal(here["again"], other["again"]), case
    assert stopped > 5


def test_reverse_mode_ends_on_all_where_one_could_not_go_back(tmp_path):
    """A rank whose v was not moved as it has to be raised alone: the others waited for it."""
    first, second = on_processes(2, tmp_path / "two", raising_hooks.going_back)
    errors = {"raises": "ZeroDivisionError", "halves": "ValueError"}
    for case, error in errors.items():
        here, other = second[case], first[case]
        assert [kind for kind, _ in here["said"]] == ["fine", error, "fine", "fine"]
        assert [kind for kind, _ in other["said"]] == ["fine", "WorkerError", "fine", "fine"]
        assert here["unchanged"], case
        assert other["unchanged"], case
        assert torch.equal(here["after"], other["after"]), case


def test_no_rank_gathers_shards_alone(tmp_path):
    """Forward passes of sharded modules wait for all ranks: who has failed is not waited for."""
    first, second = on_processes(2, tmp_path / "two", raising_hooks.raised_beside_shards)
    for case, said in second.items():
        assert [kind for kind, _ in said] == ["fine", "ZeroDivisionError", "fine"], case
        assert [kind for kind, _ in first[case]] == ["fine", "WorkerError", "fine"], case
        assert "nothing was changed" in first[case][1][1], case
