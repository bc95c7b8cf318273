"""Generators are captured, put back and replayed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torch_penalty_bilevel.undo.random_state import RandomState

DRAWS = {
    "torch": lambda: torch.rand(3).tolist(),
    "python": lambda: [random.random(), random.gauss(0, 1)],
    "numpy": lambda: np.random.rand(3).tolist(),
}


@pytest.fixture(autouse=True)
def _generators_left_as_they_were():
    state = random.getstate(), np.random.get_state()
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])


@pytest.mark.parametrize("kind", DRAWS)
def test_restore(kind: str) -> None:
    draw = DRAWS[kind]
    state = RandomState([torch.device("cpu")])
    first, second = draw(), draw()
    assert first != second
    state.restore()
    assert draw() == first
    state.restore()  # more than once
    assert draw() == first
    assert draw() == second


@pytest.mark.parametrize("kind", DRAWS)
def test_replayed_leaves_no_trace(kind: str) -> None:
    draw = DRAWS[kind]
    state = RandomState()
    first = draw()
    with state.replayed():
        assert draw() == first
        draw()
    after_the_block = draw()
    state.restore()
    assert [draw(), draw()] == [first, after_the_block]


@pytest.mark.parametrize("kind", DRAWS)
def test_replayed_leaves_no_trace_of_a_failure(kind: str) -> None:
    draw = DRAWS[kind]
    state = RandomState()
    first = draw()
    with pytest.raises(KeyError), state.replayed():
        _fail_after(draw)
    after_the_block = draw()
    state.restore()
    assert [draw(), draw()] == [first, after_the_block]


def _fail_after(draw: Callable[[], object]) -> None:
    draw()
    raise KeyError


def test_numpy_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    state = RandomState()
    first = torch.rand(1)
    state.restore()
    assert torch.equal(torch.rand(1), first)
    assert "numpy.random" not in sys.modules


def test_accelerators_go_through_their_device_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device once; stands in for CUDA, which the machine need not have."""
    states = {"cuda:0": torch.tensor([1]), "cuda:1": torch.tensor([2])}

    class Module:
        @staticmethod
        def get_rng_state(device: torch.device) -> torch.Tensor:
            return states[str(device)]

        @staticmethod
        def set_rng_state(state: torch.Tensor, device: torch.device) -> None:
            states[str(device)] = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    devices = [torch.device(name) for name in ("cuda:0", "cuda:1", "cuda:0", "cpu", "meta")]
    state = RandomState(devices)
    states["cuda:0"], states["cuda:1"] = torch.tensor([7]), torch.tensor([8])
    with state.replayed():
        assert [int(s) for s in states.values()] == [1, 2]
    assert [int(s) for s in states.values()] == [7, 8]
    state.restore()
    assert [int(s) for s in states.values()] == [1, 2]
