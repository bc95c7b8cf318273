"""What all blocks ask of an index and of a dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor


def floating(dtype: torch.dtype | None) -> torch.dtype:
    """``dtype``, by default torch's; raise TypeError if nothing of it could be learned."""
    dtype = dtype or torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:  # pyright: ignore
        raise TypeError(
            f"dtype must be a floating-point dtype, such as torch.float32, got {dtype}; integers "
            "have no gradient"
        )
    return dtype


def numbers(index: Any, count: int, device: torch.device) -> Tensor:
    """``index``, of any shape, where torch refuses whatever lies outside of [0, count).

    Raises:
        TypeError: not made of integers, a mask, say.
    """
    try:
        index = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"index must be a tensor of integers, got {index!r}") from None
    if index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
        raise TypeError(
            f"index must be a tensor of integers, got {index.dtype}; of a mask give "
            "mask.nonzero().squeeze(1)"
        )
    index = index.to(device, torch.long)
    # One past the end for negative numbers, which would count from there: torch refuses that
    # without a wait for the accelerator.
    return torch.where(index < 0, count, index)


@contextlib.contextmanager
def within(count: int, what: str) -> Generator[None]:
    """Say what is wrong with ``numbers`` of ``count`` things, ``what`` by name."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        raise IndexError(
            f"index must lie in [0, {count}), the numbers of the {what} (negative ones do not "
            "count from the end), got others"
        ) from error
