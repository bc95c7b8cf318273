"""Least squares for positive semidefinite matrices that may be singular, on one vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_residual(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float = 1e-11,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    r"""Least squares for symmetric positive semidefinite A, perhaps singular (Stiefel, 1955).

    Args:
        product: x -> A x, on one vector.
        right: b.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: products at most.

    Returns:
        The x of least norm that minimises ||b - A x||, and the rest b - A x, which is the part of b
        in the kernel of A.

    Example:
        >>> A = torch.tensor([2.0, 0.0])
        >>> conjugate_residual(lambda x: A * x, torch.tensor([4.0, 3.0]), max_iterations=9)
        (tensor([2., 0.]), tensor([0., 3.]))
    """
    x, rest = torch.zeros_like(right), right
    direction, image = rest, product(rest)
    rest_image, rho = image, float(rest @ image)
    largest, bound = 0.0, tolerance * float(right.norm())
    for _ in range(max_iterations):
        size = float(rest.norm())
        if size <= bound:
            break
        largest = max(largest, float(rest_image.norm()) / size)
        if not rho > 1e-14 * largest * size**2:  # the rest is in the kernel
            break
        step = rho / float(image @ image)
        x, rest = x + step * direction, rest - step * image
        rest_image = product(rest)
        previous, rho = rho, float(rest @ rest_image)
        direction = rest + (rho / previous) * direction
        image = rest_image + (rho / previous) * image
    size = float(rest @ rest)
    if (
        size > bound**2
    ):  # x is a polynomial in A times b, so its part in the kernel is along the rest
        x = x - (float(x @ rest) / size) * rest
    return x, rest
