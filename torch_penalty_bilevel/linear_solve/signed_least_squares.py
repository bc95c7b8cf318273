"""Linear least squares with some of the unknowns bounded below by zero."""

from __future__ import annotations

import torch
from torch import Tensor


def signed_least_squares(A: Tensor, b: Tensor, signed: Tensor) -> tuple[Tensor, float]:
    r"""Minimise ||A x - b||_2 over x with x_i >= 0 where ``signed`` (Lawson & Hanson, 1974).

    Differs from the source: unknowns without a sign are always in the passive set, and the
    least-norm solution is taken where the passive columns are dependent.

    Args:
        A: m x n.
        b: m entries.
        signed: n booleans.

    Returns:
        x and ||A x - b||_2.

    Example:
        >>> A, b = torch.eye(2), torch.tensor([-1.0, -2.0])
        >>> signed_least_squares(A, b, torch.tensor([True, False]))
        (tensor([ 0., -2.]), 1.0)
    """
    rounding = 1e-12 * (1 + float(b.norm())) * (1 + float(A.abs().max()) if A.numel() else 1.0)
    passive = ~signed
    x = _solve(A, b, passive)
    for _ in range(3 * A.shape[1] + 1):
        slope = torch.where(passive, -torch.inf, A.T @ (b - A @ x))
        if not slope.numel() or float(slope.max()) <= rounding:
            break
        passive[slope.argmax()] = True
        target = _solve(A, b, passive)
        while bool((blocked := passive & signed & (target <= 0)).any()):
            share = float((x / (x - target))[blocked].min())
            x = x + share * (target - x)
            passive = passive & ~(signed & (x <= rounding) & (target <= 0))
            x = torch.where(passive, x, 0.0)
            target = _solve(A, b, passive)
        x = target
    return x, float((A @ x - b).norm())


def _solve(A: Tensor, b: Tensor, passive: Tensor) -> Tensor:
    """The least-norm least-squares solution with the other entries zero."""
    x = A.new_zeros(A.shape[1])
    if bool(passive.any()):
        x[passive] = torch.linalg.pinv(A[:, passive], rtol=1e-12) @ b
    return x
