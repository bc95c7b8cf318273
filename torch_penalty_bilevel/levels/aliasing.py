"""Which tensors share memory, so that moving one moves the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import local


class _Place(NamedTuple):
    start: int
    """First byte in the storage."""
    end: int
    """One after the last."""
    which: int


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Indices of two tensors with a byte in common; None if there are none.

    Views of one buffer that do not meet (slices, columns) do not count. Tensors without memory of
    their own to look at (meta, sparse, empty) are left out.
    """
    tensors = [local(tensor) for tensor in tensors]
    storages: dict[tuple[torch.device, int], list[_Place]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        plain = tensor.layout == torch.strided and tensor.device.type != "meta"
        pointer = tensor.untyped_storage().data_ptr() if plain and tensor.numel() else 0
        if pointer:
            size = tensor.element_size()
            start = int(tensor.storage_offset()) * size
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            place = _Place(start, start + (int(last) + 1) * size, index)
            storages[tensor.device, pointer].append(place)
    for places in storages.values():
        places.sort()
        for i, one in enumerate(places):
            for other in places[i + 1 :]:
                if other.start >= one.end:
                    break
                if _meet(tensors[one.which], tensors[other.which], one.start):
                    return min(one.which, other.which), max(one.which, other.which)
    return None


def _meet(left: Tensor, right: Tensor, start: int) -> bool:
    """Exactly: mark the bytes of one and look at those of the other; ``start`` is the first."""

    def bytes_of(tensor: Tensor, memory: Tensor) -> Tensor:
        size = tensor.element_size()
        strides = [s * size for s in tensor.stride()]
        offset = tensor.storage_offset() * size - start
        return memory.as_strided((*tensor.shape, size), (*strides, 1), offset)

    storage = left.untyped_storage()
    memory = torch.zeros(storage.nbytes() - start, dtype=torch.bool)
    bytes_of(left, memory).fill_(True)
    return bool(bytes_of(right, memory).any())
