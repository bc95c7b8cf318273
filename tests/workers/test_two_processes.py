"""The step of several processes is that of one on their joined batch: to rounding, and together."""

import pytest
import torch
from sharing import Shared, on_processes, plain_and_in_parts, runs

from torch_penalty_bilevel import FiniteDifference

# The float32 difference over the usual step has a rounding error of 6e-4 of its own.
WIDE = FiniteDifference(relative_step=3e-2)
CASES = [
    ("stationarity", "auto", False, torch.float64),
    ("stationarity", "double_backward", True, torch.float64),
    ("stationarity", "finite_difference", True, torch.float64),
    ("stationarity", "functional", True, torch.float64),
    ("paper", "double_backward", False, torch.float64),
    ("value", "double_backward", True, torch.float64),
    ("value", "functional", False, torch.float64),
    ("fixed_point", "double_backward", True, torch.float64),
    ("fixed_point", "functional", False, torch.float64),
    ("cg", "double_backward", True, torch.float64),
    ("cg", "functional", False, torch.float64),
    ("stationarity", "double_backward", True, torch.float32),
    ("stationarity", WIDE, False, torch.float32),
    ("value", "double_backward", False, torch.float32),
    ("fixed_point", "double_backward", True, torch.float32),
    ("cg", "double_backward", False, torch.float32),
]


def names(case):
    kind, engine, wrapped, dtype = case
    engine = engine if isinstance(engine, str) else engine.name
    return f"{kind}-{engine}-{'ddp' if wrapped else 'plain'}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return on_processes(2, tmp_path_factory.mktemp("processes") / "two", runs, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[names(case) for case in CASES])
def test_two_processes_are_one(of_two, number):
    """With a scheduler, clipping hooks and a checkpoint in the middle, over 20 steps."""
    kind, engine, _, dtype = CASES[number]
    whole = Shared(kind, engine, dtype=dtype).run()
    first, second = (results[number] for results in of_two)
    allowed = 1e-10 if dtype == torch.float64 else 1e-5
    for key, value in whole.items():
        assert torch.equal(first[key], second[key])
        if key == "metrics":
            allowed *= 10  # certificates and losses, some of them small differences
        torch.testing.assert_close(first[key], value, rtol=allowed, atol=allowed)


def test_four_processes_are_one(tmp_path):
    case = ("stationarity", "double_backward", True, torch.float64)
    found = on_processes(4, tmp_path / "four", runs, [case])
    whole = Shared(case[0], case[1]).run()
    for results in found:
        for key, value in whole.items():
            torch.testing.assert_close(results[0][key], value, rtol=1e-10, atol=1e-10)


def test_micro_batches_and_plain_steps_of_two_processes_are_those_of_one(tmp_path):
    whole = plain_and_in_parts(0, 1, 1)
    for found in on_processes(2, tmp_path / "two", plain_and_in_parts, 2):
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
