"""Modules that no name leads to are found by a search, and only then is there a hook."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torch_penalty_bilevel.undo.buffers import BufferGuard
from torch_penalty_bilevel.undo.scope import Scope

X = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)  # mean 2, 4
MOVED = torch.tensor([0.2, 0.4], dtype=torch.float64)  # momentum 0.1 from zero


HIDDEN = {"net": nn.BatchNorm1d(2, dtype=torch.float64)}


def lookup() -> nn.Module:
    return globals()["HID" + "DEN"]["net"]


def test_what_has_no_name_is_found_by_a_search() -> None:
    module = nn.BatchNorm1d(2, dtype=torch.float64)
    HIDDEN["net"] = nn.Sequential(nn.Sequential(module))

    def closure() -> None:
        lookup()(X)

    scope = Scope()
    assert not scope.modules(closure)
    assert not scope.knows(closure)
    with scope.searching(), BufferGuard(scope).evaluation("lower", closure):
        closure()
    assert_close(module.running_mean, torch.zeros_like(MOVED))
    assert scope.modules(closure) == [HIDDEN["net"]]  # the outermost alone
    assert scope.knows(closure)
    guard = BufferGuard(scope)
    for _ in range(2):
        with guard.evaluation("lower", closure):
            closure()
    guard.commit()
    assert_close(module.running_mean, MOVED)
    del HIDDEN["net"], module, guard
    gc.collect()
    assert not scope.modules(closure)  # it keeps nothing alive


def test_what_a_search_finds_counts_in_the_rest_of_its_step() -> None:
    HIDDEN["net"] = module = nn.BatchNorm1d(2, dtype=torch.float64)

    def closure() -> None:
        lookup()(X)

    scope = Scope()
    guard = BufferGuard(scope)
    with scope.searching(), guard.evaluation("lower", closure):
        closure()
    for _ in range(2):
        with guard.evaluation("lower", closure):
            closure()
        assert_close(module.running_mean, torch.zeros_like(MOVED))
    guard.commit()
    assert_close(module.running_mean, MOVED)
    del HIDDEN["net"]


def test_a_failed_search_is_repeated() -> None:
    scope = Scope()
    with (
        pytest.raises(KeyError),
        scope.searching(),
        BufferGuard(scope).evaluation("lower", lookup),
    ):
        raise KeyError
    assert not scope.knows(lookup)


def test_hooks_are_there_only_in_a_search() -> None:
    has_hooks = torch.nn.modules.module._has_any_global_hook
    scope = Scope()
    with scope.searching(), BufferGuard(scope).evaluation("lower", lookup):
        assert has_hooks()
    assert not has_hooks()
    with BufferGuard(scope).evaluation("lower", lookup):
        assert not has_hooks()
