"""Gradients and Jacobians by autograd; what does not depend on a variable has the derivative 0."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

CHUNK = 128  # rows of a Jacobian formed at once


def variable(x: Tensor) -> Tensor:
    """A leaf with the value of ``x``."""
    return x.detach().requires_grad_()


def gradient(
    out: Tensor, of: tuple[Tensor, ...], cotangent: Tensor | None = None, **how: Any
) -> Any:
    """``torch.autograd.grad`` with zeros for what ``out`` does not depend on."""
    if not out.requires_grad:
        return tuple(torch.zeros_like(t) for t in of)
    grads: Any = torch.autograd.grad(out, of, cotangent, allow_unused=True, **how)
    return tuple(torch.zeros_like(t) if d is None else d for d, t in zip(grads, of, strict=True))


def jacobian(r: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rows d r_i / d x for each vector x: in batches, or singly where torch cannot batch."""
    cotangents = torch.eye(r.numel(), dtype=r.dtype, device=r.device)
    if not r.requires_grad:
        return tuple(cotangents.new_zeros(r.numel(), x.numel()) for x in of)
    parts: list[tuple[Tensor, ...]] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns where its batching is slow
            for chunk in cotangents.split(CHUNK):
                found = gradient(r, of, chunk, retain_graph=True, is_grads_batched=True)
                # What does not depend on r comes back unbatched.
                parts.append(tuple(rows.expand(len(chunk), -1) for rows in found))
    except RuntimeError:
        found = (gradient(r, of, row, retain_graph=True) for row in cotangents)
        parts = [tuple(row[None] for row in rows) for rows in found]
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
