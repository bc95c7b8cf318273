"""``fully_shard``: each process holds a part of v, and of all that is remembered about it."""

import pytest
import shards
import torch
from sharing import STEPS, on_processes

CASES = [
    ("stationarity", torch.float64),
    ("value", torch.float64),
    ("paper", torch.float64),
    ("stationarity", torch.float32),
    ("value", torch.float32),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def of_two(folder):
    return on_processes(2, folder / "two", shards.two, CASES, folder)


def close(found, value, allowed):
    for key, number in value.items():
        # Certificates, losses and weights among the metrics: some are small differences.
        bound = 10 * allowed if key == "metrics" else allowed
        torch.testing.assert_close(found[key], number, rtol=bound, atol=bound)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_shards_are_a_whole(of_two, number):
    """Tensors of 5 and 3 rows on two processes, with a clipping hook, over 20 steps."""
    kind, dtype = CASES[number]
    alone = shards.Sharded(kind, dtype=dtype).steps(0, STEPS).point()
    for each in of_two:
        close(each["runs"][number], alone, 1e-10 if dtype == torch.float64 else 1e-5)


def test_conjugate_gradients_over_shards(of_two):
    alone = shards.hypergradients(0, 1)
    for each in of_two:
        close(each["cg"], alone, 1e-9)  # products of products of differences


def test_shards_are_gathered_where_they_have_moved_to(folder):
    """Not where a forward pass without a backward one last saw them."""
    what = shards.moved_after_a_forward_pass
    alone = what(0, 1)
    for each in on_processes(2, folder / "moved", what, patience=60):
        for case, point in alone.items():
            close(each[case], point, 1e-9)


def test_what_shards_cannot_do_is_said(of_two):
    words = {
        "double_backward": 'use "finite_difference" or "auto"',
        "functional": 'use "finite_difference" or "auto"',
        "alone": 'pass reduce="mean"',
        "bound": "leave it away",
        "decay": "weight_decay=[0.1]",
        "upper": "keep them out of fully_shard",
        "check": "that is not sharded",
        "auto": "fine",
    }
    words |= dict.fromkeys(("map", "map's object", "map of cg"), "keep v out of fully_shard")
    for each in of_two:
        for name, word in words.items():
            assert word in each["refusals"][name], name
        assert torch.equal(each["refusals"]["upper gradient"], torch.ones(12))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as one process has it
@pytest.mark.parametrize("kind", shards.KINDS)
def test_one_goes_on_where_two_saved(of_two, folder, kind):
    for each in of_two:
        close(shards.loaded(0, 1, folder / kind, kind), each["saved"][kind], 1e-10)


def test_four_go_on_where_two_saved(of_two, folder):
    for found in on_processes(4, folder / "four", shards.four, folder):
        for kind, point in found.items():
            close(point, of_two[0]["saved"][kind], 1e-10)
