"""Extreme eigenvalues from products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors import Tensors, local, norm, scale, write, zeros_for
from .solution import Product


def largest_stretch(product: Product, like: Tensors, *, steps: int = 20) -> float:
    """A lower bound of ||A||_2, close for symmetric A, by the power method (von Mises, 1929).

    From a fixed random vector; 0 where A annihilates it, infinite or NaN where A is.

    Args:
        product: x -> A x.
        like: tensors with the shapes, dtypes and devices of x.
        steps: products at most.

    Example:
        >>> A = torch.tensor([-4.0, 1.0])
        >>> round(largest_stretch(lambda x: (A * x[0],), (torch.zeros(2),)), 4)
        4.0
    """
    vector, size = random_direction(like), 0.0
    for _ in range(steps):
        image = product(vector)
        size = float(norm(image))
        if not 0 < size < float("inf"):
            break
        vector = scale(image, 1.0 / size)
    return size


def random_direction(like: Tensors) -> Tensors:
    """A unit vector, always the same, that draws from no generator of the session."""
    source = torch.Generator().manual_seed(0)
    shapes = [local(t).shape for t in like]
    normal = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    placed = zeros_for(like)
    write(placed, normal)
    return scale(placed, 1.0 / float(norm(placed)))


def lanczos_lowest(
    product: Callable[[Tensor], Tensor], like: Tensor, *, steps: int = 30
) -> tuple[float, Tensor]:
    """The lowest Ritz value over the one largest in size, and its vector (Lanczos, 1950).

    From a fixed random vector, with full reorthogonalisation.

    Args:
        product: x -> A x, A symmetric.
        like: a vector with the size, dtype and device of x.
        steps: products at most.

    Example:
        >>> A = torch.tensor([-1.0, 1.0, 4.0])
        >>> ratio, vector = lanczos_lowest(lambda x: A * x, torch.zeros(3))
        >>> round(ratio, 4), vector.abs().round(decimals=4)
        (-0.25, tensor([1., 0., 0.]))
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.numel(), dtype=torch.float64, generator=generator).to(like)
    basis, images = [x / x.norm()], list[Tensor]()
    for _ in range(min(steps, like.numel())):
        images.append(product(basis[-1]))
        rest = images[-1]
        for _ in range(2):  # once more: rounding
            rest = rest - torch.stack(basis).T @ (torch.stack(basis) @ rest)
        if float(rest.norm()) <= 1e-12 * float(images[0].norm()):
            break
        basis.append(rest / rest.norm())
    Q = torch.stack(basis[: len(images)])
    T = Q @ torch.stack(images).T
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    return float(values[0] / values.abs().max().clamp_min(1e-300)), Q.T @ vectors[:, 0]
