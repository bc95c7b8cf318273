"""Live tensors at other values for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from ..tensors import Tensors, clones, write


@contextlib.contextmanager
def restored(parameters: Tensors) -> Generator[None]:
    """Let the block write into ``parameters``; restore by copy, since subtracting is not exact.

    Autocast keeps low-precision copies of parameters: they are dropped on the way out, and what
    evaluates a loss inside the block must drop them before it does.
    """
    saved = clones(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            write(parameters, saved)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def replaced(parameters: Tensors, values: Tensors) -> Generator[None]:
    """``parameters`` hold ``values`` inside the block."""
    with restored(parameters):
        with torch.no_grad():
            write(parameters, values)
        yield
