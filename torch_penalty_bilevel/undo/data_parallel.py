"""Modules that synchronise their processes by themselves, held back while a closure runs."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_QUIET = {
    "require_backward_grad_sync": False,
    "require_forward_param_sync": False,
    "find_unused_parameters": False,
    "static_graph": False,
}


def regather(module: nn.Module) -> None:
    """Let a module of ``fully_shard`` gather its parameters anew.

    After a forward pass without a backward one it may keep what it gathered, and would not see that
    its shards have moved since.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and nobody has it without
    gathered: Any = module
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        gathered.reshard()


def quieted(module: nn.Module) -> dict[str, Any] | None:
    """Let a ``DistributedDataParallel`` be the module that it wraps; returns what to put back.

    Inside closures its gradients do not pass through the hooks that would average them, second
    derivatives do not go through its own operations, and a broadcast of buffers would wait for a
    worker that has failed. ``no_sync()`` alone leaves the latter two. None for other modules.
    """
    if not isinstance(module, DistributedDataParallel):
        return None
    held = {name: vars(module)[name] for name in _QUIET}
    vars(module).update(_QUIET)
    return held
