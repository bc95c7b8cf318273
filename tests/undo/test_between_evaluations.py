"""Modules that run between evaluations, as activation checkpointing does in backward passes."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torch_penalty_bilevel.undo.buffers import BufferGuard
from torch_penalty_bilevel.undo.scope import Scope

X = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)


class Counter(nn.Module):
    """Replaces its buffer instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(2, dtype=torch.float64), Counter])
@pytest.mark.parametrize("succeeds", [True, False])
def test_it_moves_nothing(make, succeeds):
    module = make()
    originals = dict(module.named_buffers())
    guard, expected = BufferGuard(Scope()), copy.deepcopy(module)
    for level in ("upper", "lower"):
        with guard.evaluation(level, lambda: module):
            module(X)
        module(5 * X)
    if succeeds:
        expected(X)
        guard.commit()
    else:
        guard.undo()
    for name, buffer in module.named_buffers():
        assert buffer is originals[name]
        assert_close(buffer, expected.get_buffer(name), rtol=0, atol=0)


def test_what_no_evaluation_kept_is_put_back():
    """One that raised, and was caught: the step goes on, and its buffers with it."""
    module = nn.BatchNorm1d(2, dtype=torch.float64)
    guard, before = BufferGuard(Scope()), copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError), guard.evaluation("lower", lambda: module):
        raise KeyError
    module(X)
    guard.commit()
    assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
