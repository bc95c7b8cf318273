"""Module buffers (BatchNorm statistics) that move once per step, however often a loss is evaluated.

One optimizer step evaluates each loss several times. Every evaluation starts from the buffers
as they were before the step, works on clones, and is undone afterwards; the clones of one
evaluation - the first of the lower loss, or of the upper loss for modules that the lower loss
does not use - become the buffers when the step has succeeded.

Clones are swapped in, never written back with ``copy_`` while a graph is pending: batch
normalisation changes its running statistics without telling autograd, and the backward pass
of an earlier evaluation would silently use the new values.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

Key = tuple[nn.Module, str]
_PRIORITY = {"upper": 0, "lower": 1}


class BufferGuard:
    """Finds the training-mode modules that closures run and holds their buffers.

    Modules are found by a global forward hook while a closure runs, so closures need not
    say which modules they use. Evaluation-mode modules are left alone: they do not
    change their buffers.
    """

    def __init__(self) -> None:
        self._originals: dict[Key, Tensor] = {}
        self._moved: dict[Key, tuple[int, Tensor]] = {}

    @contextlib.contextmanager
    def evaluation(self, level: Literal["upper", "lower"]) -> Generator[None]:
        """Run one evaluation of a level's loss on clones of the buffers."""
        clones: dict[Key, Tensor] = {}
        visited: set[nn.Module] = set()
        thread = threading.get_ident()

        def swap_in_clones(module: nn.Module, _inputs: object) -> None:
            if module in visited or threading.get_ident() != thread:
                return
            for part in module.modules():
                if part in visited or not part.training:
                    continue
                visited.add(part)
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        self._originals.setdefault((part, name), buffer)
                        clones[part, name] = part._buffers[name] = buffer.clone()

        handle = register_module_forward_pre_hook(swap_in_clones)
        try:
            yield
            self._keep(clones, _PRIORITY[level])
        finally:
            handle.remove()
            for module, name in clones:
                module._buffers[name] = self._originals[module, name]

    def _keep(self, clones: dict[Key, Tensor], priority: int) -> None:
        for key, clone in clones.items():
            held = self._moved.get(key)
            if held is None or held[0] < priority:
                # A module may have replaced its buffer instead of writing into it.
                module, name = key
                current = module._buffers[name]
                self._moved[key] = (priority, clone if current is None else current)

    @torch.no_grad()
    def commit(self) -> None:
        """Let the buffers move: write the kept clones into the modules' own tensors."""
        for key, (_, clone) in self._moved.items():
            self._originals[key].copy_(clone)
        self._originals.clear()
        self._moved.clear()
