"""What every linear solver ends with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from ..tensors import Tensors, axpy, norm, scale

Product: TypeAlias = Callable[[Tensors], Tensors]
"""x -> A x."""


Status: TypeAlias = Literal[
    "converged", "unfinished", "negative_curvature", "diverged", "not_finite", "no_solution"
]
"""How a solve ended: within the tolerance; above it (out of products, or a method that does not
iterate); at a direction along which A is not positive; with a residual that grew; at a product that
is not finite; at the least residual, which is too large."""


class Solution(NamedTuple):
    """What a solver ends with."""

    value: Tensors
    """The last iterate; NaN after a breakdown, never a plausible wrong number."""
    iterations: int
    """Products used, without the last one, which only confirms the residual."""
    residual_norm: float
    """||b - A x||_2 of ``value`` (not squared), recomputed from the definition."""
    status: Status
    """How it ended."""
    message: str
    """What happened and what to try."""

    @property
    def converged(self) -> bool:
        """residual_norm <= tolerance * ||b||_2."""
        return self.status == "converged"

    @property
    def broke_down(self) -> bool:
        """There is no value."""
        return math.isnan(self.residual_norm)


NOT_FINITE = (
    "met a product that is not finite: the second derivative of g does not exist there (a root or "
    "a norm at zero?), or overflows"
)
"""What to say then."""


def broken(right: Tensors, products: int, status: Status, message: str) -> Solution:
    """A breakdown."""
    return Solution(scale(right, math.nan), products, math.nan, status, message)


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
        return Solution(value, products, error, "converged", "converged")
    if math.isnan(error):
        how = f"{NOT_FINITE}; or the iteration diverged: {remedy}"
        return broken(right, products, "not_finite", how)
    # The slack is for the rounding of x = 0 itself.
    if not error <= max(worst * size, first) * (1 + 1e-6) < math.inf:
        message = f"diverged: ||b - A x|| = {error:.1e} after {products} products, worse than x = 0"
        return broken(right, products, "diverged", f"{message}; {remedy}")
    return Solution(value, products, error, "unfinished", stopped(products, error, tolerance))


def first_residual(product: Product, right: Tensors, start: Tensors | None) -> Tensors:
    """The residual b - A x at the start, zero where there is none."""
    return right if start is None else axpy(-1.0, product(start), right)
