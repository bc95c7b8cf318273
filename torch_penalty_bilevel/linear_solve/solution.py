"""What every linear solver ends with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from ..tensors import Tensors, axpy, norm, scale

Product: TypeAlias = Callable[[Tensors], Tensors]
"""x -> A x."""


class Solution(NamedTuple):
    """What a solver ends with."""

    value: Tensors
    """The last iterate; NaN after a breakdown, never a plausible wrong number."""
    iterations: int
    """Products used, without the last one, which only confirms the residual."""
    residual_norm: float
    """||b - A x||_2 of ``value`` (not squared), recomputed from the definition."""
    converged: bool
    """residual_norm <= tolerance * ||b||_2."""
    message: str
    """What happened and what to try."""


def broken(right: Tensors, products: int, message: str) -> Solution:
    """A breakdown."""
    return Solution(scale(right, math.nan), products, math.nan, False, message)


def stopped(products: int, error: float, tolerance: float) -> str:
    """What to say of a solver that ran out of products."""
    return (
        f"stopped after {products} products with ||b - A x|| = {error:.1e} > {tolerance:.1e} * "
        "||b||; raise max_iterations or tolerance, or add damping"
    )


def ended(
    value: Tensors,
    residual: Tensors,
    right: Tensors,
    products: int,
    tolerance: float,
    *,
    worst: float = 1.0,
    first: float = 0.0,
    remedy: str,
) -> Solution:
    """The solution of an iteration that may diverge, given its true residual b - A x.

    Args:
        value: x, the last iterate.
        residual: b - A x, from the definition.
        right: b.
        products: used before ``residual`` was computed.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        worst: a residual above this many ||b||_2, the residual of x = 0, is divergence.
        first: ||b - A x_0||_2. A start from another equation may be worse than x = 0, and few
            iterations leave it so: only a residual that exceeds this one as well has grown.
        remedy: what to do about divergence.
    """
    error, size = float(norm(residual)), float(norm(right))
    if error <= tolerance * size < math.inf:
        return Solution(value, products, error, True, "converged")
    # The slack is for the rounding of x = 0 itself.
    if not error <= max(worst * size, first) * (1 + 1e-6) < math.inf:
        message = f"diverged: ||b - A x|| = {error:.1e} after {products} products, worse than x = 0"
        return broken(right, products, f"{message}; {remedy}")
    return Solution(value, products, error, False, stopped(products, error, tolerance))


def first_residual(product: Product, right: Tensors, start: Tensors | None) -> Tensors:
    """The residual b - A x at the start, zero where there is none."""
    return right if start is None else axpy(-1.0, product(start), right)
