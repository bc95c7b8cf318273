"""All or nothing: a step that fails leaves everything as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch.optim import Optimizer

from .buffers import BufferGuard
from .random_state import RandomState
from .rule_memory import copied
from .scope import Scope


@contextlib.contextmanager
def all_or_nothing(
    rules: Sequence[Optimizer], devices: Sequence[torch.device], scope: Scope
) -> Generator[BufferGuard]:
    """Undo on any exception what the block did to random generators, buffers and ``rules``.

    Args:
        rules: optimizers that may step before the block's last evaluation; their parameters,
            gradients and state are copied first. Empty where every evaluation comes
            before every update: then there is nothing to copy.
        devices: devices whose random generators the closures may use.
        scope: knows the modules whose buffers the closures move.
    """
    random = RandomState(devices)
    copies = [_Copy(rule) for rule in rules]
    guard = BufferGuard(scope)
    try:
        yield guard
    except BaseException:
        for copy in copies:
            copy.restore()
        guard.undo()
        random.restore()
        raise
    guard.commit()


@contextlib.contextmanager
def rehearsal(
    rules: Sequence[Optimizer], devices: Sequence[torch.device], scope: Scope
) -> Generator[BufferGuard]:
    """Undo in any case what the block did to random generators, buffers, parameters, gradients.

    Compiled code runs uncompiled inside, where it has second derivatives to compare with.

    Args:
        rules: optimizers whose parameters the block may move; it does not step them.
        devices: devices whose random generators the closures may use.
        scope: knows the modules whose buffers the closures move.
    """
    random = RandomState(devices)
    parameters = [p for rule in rules for group in rule.param_groups for p in group["params"]]
    saved = [(p, p.detach().clone(), p.grad) for p in parameters]
    guard = BufferGuard(scope)  # never committed
    try:
        with scope.searching():
            yield guard
    finally:
        guard.undo()
        with torch.no_grad():
            for parameter, value, grad in saved:
                parameter.copy_(value)
                parameter.grad = grad
        random.restore()


class _Copy:
    """One rule's parameters, gradients, group options and state, by value."""

    def __init__(self, rule: Optimizer) -> None:
        self._rule = rule
        self._groups = [
            {k: v for k, v in group.items() if k != "params"} for group in rule.param_groups
        ]
        parameters = [p for group in rule.param_groups for p in group["params"]]
        self._values = [(p, p.detach().clone(), p.grad) for p in parameters]
        self._state = {p: copied(rule.state[p]) for p in parameters if p in rule.state}

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value, grad in self._values:
            parameter.copy_(value)
            parameter.grad = grad
            if parameter in self._state:
                self._rule.state[parameter] = self._state[parameter]
            else:
                self._rule.state.pop(parameter, None)
        for group, options in zip(self._rule.param_groups, self._groups, strict=True):
            group.update(options)
