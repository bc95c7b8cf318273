"""Bytes that vector work moves: what each operation reads and writes, where torch dispatches it.

Passes over vectors of the size of v are what a step costs beside its gradients; a machine does them
at the speed of its memory. Matrix products count as gradients and not here, views move nothing.
An upper bound: a kernel that fuses several operations reads once what they read several times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach}


class Traffic(TorchDispatchMode):
    """Counts inside the block, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if not func.is_view and packet not in _PRODUCTS and packet not in _NOTHING:
            read = _bytes((args, kwargs))
            # What is written in place is among the arguments: read, and written.
            written = _bytes(found) or sum(
                _bytes(a)
                for a, of in zip(args, func._schema.arguments, strict=False)
                if of.alias_info is not None and of.alias_info.is_write
            )
            if packet in (aten.zeros_like, aten.fill_, aten.zero_, aten.copy_, aten._foreach_copy_):
                read -= _bytes(args[0])  # overwritten or looked at for its shape
            self.moved[packet.__name__] += read + written
        return found

    @property
    def total(self) -> int:
        """Bytes of all operations."""
        return self.moved.total()


def moved(step: Callable[[], object]) -> Counter[str]:
    """Bytes that one step moves, by operation."""
    with Traffic() as traffic:
        step()
    return traffic.moved


def _bytes(values: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(values) if isinstance(t, Tensor))
