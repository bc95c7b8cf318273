"""Random data of the problems: float64 on the CPU, from generators of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .protocol import Bounds, Point


def generator(seed: int) -> Generator:
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


def vector(*values: float) -> Tensor:
    """The given numbers."""
    return torch.tensor(values, dtype=torch.float64)


def normal(source: Generator, *shape: int) -> Tensor:
    """Standard normal entries."""
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def uniform(source: Generator, size: int, low: float, high: float) -> Tensor:
    """Entries uniform between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(size, generator=source, dtype=torch.float64)


def matrix(source: Generator, rows: int, columns: int, kappa: float) -> Tensor:
    """A random matrix of full rank, singular values from 1 to sqrt(kappa), evenly in logarithm.

    So A'A (or AA', whichever is smaller) has the eigenvalues 1 to kappa.
    """
    if not kappa >= 1:
        raise ValueError(f"kappa is a condition number and must be >= 1, got {kappa}")
    rank = min(rows, columns)
    left = torch.linalg.qr(normal(source, rows, rank)).Q
    right = torch.linalg.qr(normal(source, columns, rank)).Q
    values = torch.as_tensor(kappa, dtype=torch.float64) ** torch.linspace(
        0, 0.5, rank, dtype=torch.float64
    )
    return left @ torch.diag(values) @ right.T


def positive_definite(source: Generator, size: int, kappa: float) -> Tensor:
    """A random symmetric matrix with the eigenvalues 1 to kappa."""
    root = matrix(source, size, size, kappa)
    return root.T @ root


def normal_start(n_upper: int, n_lower: int, spread: float = 1.0) -> Callable[[Generator], Point]:
    """Both levels normal with standard deviation ``spread``."""
    return lambda source: (spread * normal(source, n_upper), spread * normal(source, n_lower))


def uniform_start(
    upper: Bounds, lower: Bounds, n_upper: int = 1, n_lower: int = 1
) -> Callable[[Generator], Point]:
    """Both levels uniform in a box."""
    return lambda source: (uniform(source, n_upper, *upper), uniform(source, n_lower, *lower))
