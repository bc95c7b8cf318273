"""All that one evaluation has to average, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import OptionalTensors, Pair, Tensors, filled
from .mean import Reduce, one_worker


class Averaged(NamedTuple):
    """What ``averaged`` was given, averaged."""

    lower: tuple[Tensors, ...]
    upper: OptionalTensors
    """With several workers zero where none has an entry: who knows is ``used``."""
    losses: Tensors
    used: Tensors
    """(share of workers that have the entry, for each of ``upper``,); () with one worker."""


def averaged(
    reduce: Reduce, at: Pair, lower: Sequence[Tensors], upper: OptionalTensors, losses: Tensors
) -> Averaged:
    """One call of ``reduce`` for vectors of the lower level, one of the upper, and 0-d losses.

    A parameter that only some workers' losses use has a gradient on those and None on the others,
    which must all send the same: zeros, and a word about it.
    """
    if reduce is one_worker:
        return Averaged(tuple(lower), upper, losses, ())
    like, n = at.lower[0], len(at.lower)
    dtype = torch.promote_types(like.dtype, torch.float32)
    numbers = tuple(loss.detach().to(like.device, dtype) for loss in losses)
    used = torch.tensor([u is not None for u in upper], device=like.device, dtype=dtype)
    vectors = [t for vector in lower for t in vector]
    found = reduce((*vectors, *filled(upper, at.upper), *numbers, used))
    parts = tuple(found[i : i + n] for i in range(0, len(vectors), n))
    # Gradients outlive the step: views would keep everything that they travelled with.
    end = len(vectors) + len(upper)
    above = tuple(t.clone() for t in found[len(vectors) : end])
    back = tuple(t.to(s.device, s.dtype) for t, s in zip(found[end:-1], losses, strict=True))
    return Averaged(parts, above, back, (found[-1],))


def without_unused(upper: OptionalTensors, used: Sequence[float]) -> OptionalTensors:
    """None where no worker has an entry; ``used`` is () with one worker."""
    if not used:
        return upper
    return tuple(t if share > 0 else None for t, share in zip(upper, used, strict=True))


def scalar(reduce: Reduce, loss: Tensor, like: Tensor) -> Tensor:
    """A loss that is averaged by itself."""
    if reduce is one_worker:
        return loss
    dtype = torch.promote_types(like.dtype, torch.float32)
    return reduce((loss.detach().to(like.device, dtype),))[0].to(loss.device, loss.dtype)


__all__ = ["Averaged", "Tensor", "averaged", "scalar", "without_unused"]
