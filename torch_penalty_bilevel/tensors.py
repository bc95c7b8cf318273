"""Vector algebra on tuples of tensors.

A point or direction of one level is a tuple with one tensor per parameter. Nothing is
flattened, so every tensor keeps its dtype, its device and its layout; scalars stay 0-d tensors,
so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]
OptionalTensors: TypeAlias = tuple[Tensor | None, ...]


class Pair(NamedTuple):
    """A point or a vector of the joint space: one tuple for each level."""

    upper: Tensors
    lower: Tensors


class OptionalPair(NamedTuple):
    """A gradient of both levels; None marks a parameter that the loss does not depend on."""

    upper: OptionalTensors
    lower: OptionalTensors


def accumulation_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype for reductions and multipliers: at least float32, whatever the parameters are."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def dense(tensor: Tensor) -> Tensor:
    """Not sparse, in at least float32."""
    strided = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return strided.to(torch.promote_types(tensor.dtype, torch.float32))


def coarsest_eps(tensors: Sequence[Tensor]) -> float:
    """The relative rounding error of the least precise dtype."""
    return max(torch.finfo(t.dtype).eps for t in tensors)


def zeros_for(parameters: Sequence[Tensor]) -> Tensors:
    """Zeros shaped and placed like ``parameters``, in at least float32."""
    return tuple(
        torch.zeros_like(
            p,
            dtype=torch.promote_types(p.dtype, torch.float32),
            requires_grad=False,
            memory_format=torch.preserve_format,
        )
        for p in parameters
    )


def clones(tensors: Sequence[Tensor]) -> Tensors:
    """Detached copies."""
    return tuple(t.detach().clone() for t in tensors)


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy in place, shards alike into shards; the caller says whether autograd listens."""
    torch._foreach_copy_([local(t) for t in targets], [local(v) for v in values])


def placed(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensors:
    """Copies with the devices and dtypes of ``like``."""
    pairs = zip(tensors, like, strict=True)
    return tuple(t.detach().clone().to(s.device, s.dtype) for t, s in pairs)


def check_like(name: str, saved: Sequence[Tensor], here: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` unless ``saved`` has the shapes of what it would replace."""
    theirs, own = [tuple(t.shape) for t in saved], [tuple(t.shape) for t in here]
    if theirs != own:
        raise ValueError(f"the checkpoint's {name} has shapes {theirs}, expected {own}")


def filled(gradients: OptionalTensors, parameters: Tensors) -> Tensors:
    """``gradients`` with a zero tensor in the place of each None."""
    return tuple(
        torch.zeros_like(p, requires_grad=False) if g is None else g
        for g, p in zip(gradients, parameters, strict=True)
    )


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """``left + right``, tensor by tensor; either may hold sparse tensors."""
    if any(t.layout != torch.strided for t in (*left, *right)):
        return tuple(sum_of(a, b) for a, b in zip(left, right, strict=True))
    return tuple(torch._foreach_add(tuple(left), tuple(right))) if left else ()


def sum_of(left: Tensor, right: Tensor) -> Tensor:
    """``left + right``; either may be sparse."""
    if left.layout != torch.strided and right.layout == torch.strided:
        return right + left  # torch adds sparse to dense only in this order
    return left + right


def sum_of_present(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """``left + right``; None counts as zero and stays None only if both are."""
    if left is None or right is None:
        return right if left is None else left
    return sum_of(left, right)


def sum_of_optional(left: OptionalTensors, right: OptionalTensors) -> OptionalTensors:
    """``sum_of_present``, tensor by tensor."""
    return tuple(sum_of_present(a, b) for a, b in zip(left, right, strict=True))


def scale(tensors: Sequence[Tensor], factor: Tensor | float) -> Tensors:
    """``factor * tensors``; a 0-d tensor factor is moved to each tensor's device."""
    if not tensors:
        return ()
    if isinstance(factor, Tensor) and any(t.device != factor.device for t in tensors):
        return tuple(t * factor.to(t.device) for t in tensors)
    return tuple(torch._foreach_mul(tuple(tensors), factor))


def axpy(factor: Tensor | float, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensors:
    """``factor * x + y``."""
    if isinstance(factor, float) and all(t.layout == torch.strided for t in (*x, *y)):
        return tuple(torch._foreach_add(tuple(y), tuple(x), alpha=factor)) if x else ()
    return add(scale(x, factor), y)


@torch.no_grad()
def shift(parameters: Tensors, by: Tensors) -> None:
    """Add in place."""
    for parameter, step in zip(parameters, by, strict=True):
        parameter.add_(step.to(parameter.dtype))


def combination(coefficients: Sequence[float], vectors: Sequence[Tensors]) -> Tensors:
    """``sum_i c_i v_i`` of at least one vector; they are dense."""
    result = scale(vectors[0], coefficients[0])
    for number, vector in zip(coefficients[1:], vectors[1:], strict=True):
        torch._foreach_add_(result, vector, alpha=number)
    return result


def cast_like(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensors:
    """``tensors`` in the dtype of ``targets`` (products want cotangents of the output's dtype)."""
    return tuple(t.to(s.dtype) for t, s in zip(tensors, targets, strict=True))


def norms(tensors: Sequence[Tensor]) -> Tensors:
    """Euclidean norm of each tensor, 0-d, accumulated in at least float32."""
    dtype = accumulation_dtype(tensors)
    dense = tuple(local(t if t.layout == torch.strided else t.coalesce().values()) for t in tensors)
    found = tuple(torch._foreach_norm(dense, 2, dtype=dtype)) if dense else ()
    if not any(map(is_sharded, tensors)):
        return found
    squares = over_shards(tensors, tuple(n.double().square() for n in found))
    return tuple(s.sqrt().to(dtype) for s in squares)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of the whole tuple, ||t||_2 (not squared), 0-d."""
    if not tensors:
        return torch.zeros(())
    parts = norms(tensors)
    return torch.linalg.vector_norm(torch.stack([p.to(parts[0].device) for p in parts]))


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """Inner product of each pair, 0-d, accumulated in at least float32."""
    dtype = accumulation_dtype((*left, *right))
    flat = [
        local(t if t.layout == torch.strided else t.to_dense()).reshape(-1).to(dtype)
        for t in (*left, *right)
    ]
    n = len(left)
    pairs = zip(flat[:n], flat[n:], strict=True)
    return over_shards(left, tuple(torch.dot(a, b) for a, b in pairs))


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product <left, right> of the whole tuples, 0-d, in at least float32."""
    if not left:
        return torch.zeros(())
    return torch.stack([part.to(left[0].device) for part in dots(left, right)]).sum()


def gram(vectors: Sequence[Tensors]) -> Tensor:
    """All inner products <v_i, v_j> of whole dense tuples shaped alike, (n, n).

    In at least float32, on the first tensor's device. A matrix product of pieces that lie side by
    side and fit into the cache: twice as fast as one inner product after the other, and no copy
    of large vectors.
    """
    total: Tensor | None = None
    for layout, places in _by_layout(vectors[0]).items():
        of_layout = [tuple(local(v[place]) for place in places) for v in vectors]
        for rows in _side_by_side(of_layout):
            wide = rows.double() if rows.is_cuda else rows  # TF32 would round the factors
            part = _summed(wide @ wide.T, layout)
            total = part if total is None else total + part.to(total)
    return torch.zeros(len(vectors), len(vectors)) if total is None else total


# Sharded tensors (``DTensor``): all that has to know of the other shards is here.


def is_sharded(tensor: Tensor) -> bool:
    """Is it a ``DTensor``, of which every process holds a part?"""
    kind = type(tensor)
    return kind is not Tensor and kind is not torch.nn.Parameter and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, without a graph; of ordinary tensors all."""
    held: Any = tensor
    return held.detach().to_local() if is_sharded(tensor) else tensor


def over_shards(tensors: Sequence[Tensor], parts: Tensors) -> Tensors:
    """Sums over all shards, where ``parts`` has a number of this process's shard of each."""
    found = list(parts)
    for layout, places in _by_layout(tensors).items():
        if layout is not None:
            summed = _summed(torch.stack([parts[place] for place in places]), layout)
            for place, total in zip(places, summed.unbind(), strict=True):
                found[place] = total
    return tuple(found)


def _by_layout(tensors: Sequence[Tensor]) -> dict[Any, list[int]]:
    """Places of the tensors of each (mesh, placements); None for ordinary ones."""
    found: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        held: Any = tensor
        layout = (held.device_mesh, held.placements) if is_sharded(tensor) else None
        found.setdefault(layout, []).append(place)
    return found


def _summed(numbers: Tensor, layout: Any) -> Tensor:
    if layout is not None:
        mesh, placements = layout
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(numbers, group=mesh.get_group(dimension))
    return numbers


_CACHED = 2**15
"""Numbers of a vector that are looked at together on a CPU."""


def _side_by_side(vectors: Sequence[Tensors]) -> Iterator[Tensor]:
    """Pieces of the vectors as rows of matrices."""
    for device in dict.fromkeys(t.device for t in vectors[0]):
        here = [[t.reshape(-1) for t in v if t.device == device] for v in vectors]
        size = sum(t.numel() for t in here[0])
        if size <= _CACHED or device.type != "cpu":
            yield torch.cat([t for v in here for t in v]).view(len(vectors), size)
            continue
        for parts in zip(*here, strict=True):
            for pieces in zip(*(t.split(_CACHED) for t in parts), strict=True):
                yield torch.stack(pieces)
