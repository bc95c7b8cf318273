"""What an optimizer remembers about one parameter."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Moments: TypeAlias = dict[str, Any]
"""One entry of ``optimizer.state``; empty before the first step."""


def copied(memory: Moments) -> Moments:
    """A copy that does not share tensors."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in memory.items()}


def relocated(memory: Moments, device: torch.device) -> Moments:
    """A copy with its tensors on ``device``; 0-d ones, step counters, stay."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(device if value.dim() > 0 else value.device)

    return {k: one(v) for k, v in memory.items()}
