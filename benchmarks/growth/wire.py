r"""Bytes on the wire: what a process hands to collectives, seen where torch dispatches them.

A message of n bytes in all makes each of W processes send, by ring algorithms (Patarasuk and Yuan,
J. Parallel Distrib. Comput. 69, 2009),

.. math:: 2\tfrac{W-1}{W}\,n \ \text{(all-reduce)}, \qquad
          \tfrac{W-1}{W}\,n \ \text{(all-gather, reduce-scatter)}

where n is the whole vector, of which a gather begins and a scatter ends with the W-th part. Not
looked at: how a backend does it. gloo's reduce-scatter is an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# How often a ring sends each byte of a message, over (W - 1) / W.
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
_KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}
_SILENT = ("barrier", "monitored_barrier_")


class Message(NamedTuple):
    """One collective operation."""

    kind: str
    payload: int
    """n, in bytes."""

    def sent(self, world: int) -> float:
        """Bytes that each of ``world`` processes sends."""
        return PASSES[self.kind] * self.payload * (world - 1) / world


class Messages(TorchDispatchMode):
    """Notes all collective operations inside the block, those of backward hooks too.

    Raises:
        NotImplementedError: one of a kind that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            if name in _KINDS:
                # Of a gather and a scatter the longer side, whichever comes first.
                sides = [sum(t.nbytes for t in _tensors(a)) for a in args[:2]]
                self.seen.append(Message(_KINDS[name], max(sides)))
            elif name not in _SILENT:
                raise NotImplementedError(f"bytes of {func} are not known")
        return func(*args, **(kwargs or {}))

    def sent(self, world: int) -> float:
        """Bytes that each process sent."""
        return sum(message.sent(world) for message in self.seen)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
