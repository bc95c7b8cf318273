"""Module buffers (BatchNorm statistics) that move once per step, however often a loss is evaluated.

One optimizer step evaluates each loss several times. Every evaluation starts from the buffers
as they were before the step, works on clones, and is undone afterwards; the clones of one
evaluation - the first of the lower loss, or of the upper loss for modules whose buffers the lower
loss does not move - become the buffers when the step has succeeded. A loss in parts (micro-batches)
is evaluated once when all of them are: each part goes on where the one before left the buffers.

A closure may choose the mode itself: f calls ``eval()``, g ``train()``. Which mode a module was
found in then says nothing of what its buffers will do, so that of what has ever trained all are
clones, in either mode; the evaluation that trains moves them.

Clones are swapped in, never written back with ``copy_`` while a graph is pending: batch
normalisation changes its running statistics without telling autograd, and the backward pass
of an earlier evaluation would silently use the new values.

Activation checkpointing runs modules once more in a backward pass, between evaluations, and moves
what they hold then. So every evaluation starts from copies, which are put back as well.

Odd buffers (sparse, nested, quantised, expanded or inference tensors) cannot be compared or written
into like others: they move where autograd was told so, by another tensor in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .data_parallel import quieted, regather
from .scope import Scope

Buffers: TypeAlias = dict[str, Tensor]
Level: TypeAlias = Literal["upper", "lower"]


class Turn(NamedTuple):
    """Which part of a loss is evaluated, of how many, in order."""

    number: int
    total: int


WHOLE = Turn(0, 1)


class BufferGuard:
    """Holds the buffers of the modules that closures may use.

    Those that no evaluation has seen training are left alone: they do not change their buffers.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._roots: dict[int, tuple[object, Sequence[nn.Module]]] = {}
        self._originals: dict[nn.Module, Buffers] = {}
        self._before: dict[nn.Module, Buffers] = {}
        """Copies of the originals, made when the step met the module."""
        self._odd: dict[nn.Module, Buffers] = {}
        """Those originals that are."""
        self._first: dict[Level, dict[nn.Module, _Moved]] = {"lower": {}, "upper": {}}
        self._passed: dict[Level, dict[nn.Module, _Moved]] = {"lower": {}, "upper": {}}

    def expect(self, *functions: Callable[..., Any]) -> bool:
        """Say which functions will be evaluated; returns whether any of their code is new."""
        self._scope.is_new = not self._scope.knows(*functions)
        return self._scope.is_new

    @contextlib.contextmanager
    def evaluation(
        self, level: Level, function: Callable[..., Any], turn: Turn = WHOLE
    ) -> Generator[None]:
        """One evaluation of a level's loss, a call of ``function``, on clones of the buffers."""
        clones: dict[nn.Module, Buffers] = {}
        passed = self._passed[level] if turn.total > 1 else {}
        if turn.number == 0:
            passed.clear()
        visited: set[nn.Module] = set()
        wrappers: list[tuple[nn.Module, dict[str, Any]]] = []

        def swap_in_clones(root: nn.Module) -> bool:
            fresh = root not in visited
            pending = [root] if fresh else []
            while pending:  # as root.modules() does, in half the time
                part = pending.pop()
                if part in visited:
                    continue
                visited.add(part)
                pending.extend(m for m in part._modules.values() if m is not None)
                if part._buffers and (part.training or self._scope.may_train(part)):
                    self._swap(part, clones, passed)
                regather(part)
                if (flags := quieted(part)) is not None:
                    wrappers.append((part, flags))
            return fresh

        try:
            for root in self._modules(function):
                swap_in_clones(root)
            if self._scope.searches:
                with self._scope.watching(function, swap_in_clones):
                    yield
            else:
                yield
            self._remember_trained(visited, clones)
            for module, own in clones.items():
                odd = self._odd[module]
                if turn.total > 1:
                    passed[module] = _Moved.of(module, own, odd, passed.get(module))
                elif module not in self._first[level]:
                    self._first[level][module] = _Moved.of(module, own, odd)
            # A search may call a part more than once.
            if 1 < turn.total == turn.number + 1 and not self._scope.searches:
                for module, moved in passed.items():
                    self._first[level].setdefault(module, moved)
        finally:
            for module in clones:
                _put(self._originals[module], module)
            for wrapper, flags in wrappers:
                vars(wrapper).update(flags)

    def _remember_trained(self, used: set[nn.Module], clones: dict[nn.Module, Buffers]) -> None:
        """Those that an evaluation left training, or moved before it left them evaluating."""
        for part in used:
            if part.training:
                if part._buffers:
                    self._scope.trained.add(part)
            elif self._scope.searches and part in clones and _moves(part, self._originals[part]):
                self._scope.trained.add(part)

    def _modules(self, function: Callable[..., Any]) -> Sequence[nn.Module]:
        """Looked up once in a step, unless a search may still add to them."""
        if self._scope.searches:
            return self._scope.modules(function)
        if id(function) not in self._roots:  # whose id is its own as long as it is kept
            self._roots[id(function)] = function, self._scope.modules(function)
        return self._roots[id(function)][1]

    def _swap(
        self,
        module: nn.Module,
        clones: dict[nn.Module, Buffers],
        passed: dict[nn.Module, _Moved],
    ) -> None:
        if module not in self._originals:
            held = {name: b for name, b in module._buffers.items() if b is not None}
            self._originals[module] = held
            self._before[module] = {name: b.clone() for name, b in held.items()}
            self._odd[module] = {name: b for name, b in held.items() if _is_odd(b)}
        held = self._before[module]
        if module in passed:  # whose graph is not part of this one
            held = {name: b.detach() for name, b in passed[module].buffers.items()}
        clones[module] = {name: b.clone() for name, b in held.items()}
        _put(clones[module], module)

    @torch.no_grad()
    def commit(self) -> None:
        """Let the buffers move: write what was kept into the modules' own tensors."""
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for module, originals in self._originals.items():
            _put(originals, module)
            before, odd = self._before[module], self._odd[module]
            for name, value in (before | odd | self._final(module, before, odd)).items():
                if name in odd and value is odd[name]:
                    continue
                if name not in odd and value.shape == originals[name].shape:
                    targets.append(originals[name])
                    values.append(value)
                else:  # a memory bank that has grown
                    module._buffers[name] = value.detach()
        if targets:
            torch._foreach_copy_(targets, values)
        memory = (self._originals, self._before, self._odd)
        for held in (*memory, *self._first.values(), *self._passed.values()):
            held.clear()

    @torch.no_grad()
    def undo(self) -> None:
        """Let no buffer have moved."""
        for module, originals in self._originals.items():
            _put(originals, module)
            for name in originals.keys() - self._odd[module].keys():
                originals[name].copy_(self._before[module][name])

    def _final(self, module: nn.Module, before: Buffers, odd: Buffers) -> Buffers:
        lower, upper = (self._first[level].get(module) for level in ("lower", "upper"))
        if lower is None or upper is None:
            return (lower or upper or _Moved({}, set())).buffers
        if lower.told:
            return lower.buffers
        # Without asking the device, which would wait for it: did the lower loss move any of them?
        plain = {name: b for name, b in before.items() if name not in odd}
        if not plain:
            return upper.buffers
        device = next(iter(plain.values())).device
        changes = [(lower.buffers[n] != b).any().to(device) for n, b in plain.items()]
        moved = torch.stack(changes).any()
        if any(upper.buffers[n].shape != b.shape for n, b in plain.items()):
            return (lower if moved else upper).buffers
        return upper.buffers | {
            n: torch.where(moved.to(b.device), lower.buffers[n], upper.buffers[n])
            for n, b in plain.items()
        }


def _is_odd(buffer: Tensor) -> bool:
    if buffer.layout != torch.strided or buffer.is_nested or buffer.is_quantized:
        return True
    repeats = (n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))
    return buffer.is_inference() or any(repeats)


def _moves(module: nn.Module, before: Buffers) -> bool:
    """By value, as kernels need not tell; buffers that cannot be compared count as moved."""
    try:
        with torch.no_grad():
            pairs = [(module._buffers.get(name), buffer) for name, buffer in before.items()]
            return not all(now is not None and torch.equal(now, b) for now, b in pairs)
    except RuntimeError:
        return True


def _put(buffers: Buffers, module: nn.Module) -> None:
    for name, buffer in buffers.items():
        module._buffers[name] = buffer


class _Moved(NamedTuple):
    """A module's buffers after an evaluation that may have used it."""

    buffers: Buffers
    told: set[str]
    """Which were replaced or written into; of others kernels may have, and not told autograd."""

    @classmethod
    def of(
        cls, module: nn.Module, clones: Buffers, odd: Buffers, before: _Moved | None = None
    ) -> _Moved:
        now = dict(clones)
        for name in clones:  # a module may have replaced its buffer instead of writing into it
            if (held := module._buffers.get(name)) is not None:
                now[name] = held
        told = {n for n, clone in clones.items() if now[n] is not clone or clone._version > 0}
        told |= set() if before is None else before.told
        return cls(now | {n: b for n, b in odd.items() if n not in told}, told)
