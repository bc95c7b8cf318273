r"""The average over processes, as few messages as there are dtypes and devices.

.. math:: \bar t = \frac{1}{W} \sum_{w=1}^{W} t_w
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist

from ..errors import warn
from ..tensors import Tensors, dense, is_sharded

Reduce: TypeAlias = Callable[[Tensors], Tensors]
"""Averages a tuple of tensors over the workers that share one problem; identity on one worker."""

_MUST = 'reduce must be a callable on a tuple of tensors, "mean" or None'


def one_worker(tensors: Tensors) -> Tensors:
    """Their average: themselves."""
    return tensors


class Mean:
    """The mean over a process group: the same numbers, bit by bit, on all of its processes.

    Tensors of one device and dtype travel as one; those of 16 bits in float32. 0-d tensors travel
    on the device of the first.

    Args:
        group: of torch.distributed; None: the default one, or one process where there is none.

    Raises:
        RuntimeError: WORLD_SIZE announces several processes and nobody has joined them.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Mean:
        return self  # processes are not copied

    def __call__(self, tensors: Tensors) -> Tensors:
        count = self._count()
        if count == 1 or not tensors:
            return tensors
        home = tensors[0].device
        buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for place, tensor in enumerate(tensors):
            if is_sharded(tensor):  # gradients of these are averages when they arrive
                continue
            wide = torch.promote_types(tensor.dtype, torch.float32)
            where = tensor.device if tensor.dim() else home
            buckets.setdefault((where, wide), []).append(place)
        found = list(tensors)
        for (device, dtype), places in buckets.items():
            parts = [dense(tensors[place]) for place in places]
            flat = torch.cat([part.reshape(-1).to(device, dtype) for part in parts])
            dist.all_reduce(flat, group=self.group)
            flat /= count
            ends = flat.split([part.numel() for part in parts])
            for place, part, end in zip(places, parts, ends, strict=True):
                own = tensors[place]
                found[place] = end.view(part.shape).to(own.device, own.dtype)
        return tuple(found)

    def _count(self) -> int:
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(self.group)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError(
                f'reduce="mean" in one of WORLD_SIZE={os.environ["WORLD_SIZE"]} processes that '
                "have not met: call torch.distributed.init_process_group() before the first step"
            )
        return 1


def resolve(reduce: Any, process_group: Any) -> Reduce:
    """The average that a user asks for.

    Raises:
        ValueError, TypeError: no average, or a group without ``"mean"`` or this process.
    """
    if process_group is not None and reduce != "mean":
        raise ValueError(f'process_group is for reduce="mean", got reduce={reduce!r}')
    if isinstance(reduce, str):
        if reduce != "mean":
            raise ValueError(f"{_MUST}, got {reduce!r}")
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ValueError("this process is not in process_group; give it one of its own")
        return Mean(process_group)
    if reduce is not None and not callable(reduce):
        raise TypeError(f"{_MUST}, got {reduce!r}")
    return cast(Reduce, reduce or one_worker)


def warn_of_strangers() -> bool:
    """Warn where several processes run and nothing is averaged; returns whether."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    warn(
        f"{dist.get_world_size()} processes take steps without reduce, each on a problem of its "
        'own: parameters that began alike drift apart. Pass reduce="mean" to share one problem, '
        "or reduce=lambda tensors: tensors if that is meant",
        UserWarning,
    )
    return True
