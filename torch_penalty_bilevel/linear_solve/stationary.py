"""Iterations whose every step is the same: fixed-point (Richardson) iteration, Neumann series."""

from __future__ import annotations

import math

from ..tensors import Tensors, axpy, norm, scale
from .solution import Product, Solution, ended, first_residual

_REMEDY = "the iteration needs a smaller step_size, or A is not the kind it is for (cg_normal is)"


def fixed_point(
    product: Product,
    right: Tensors,
    *,
    step_size: float = 1.0,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    start: Tensors | None = None,
) -> Solution:
    r"""Solve A x = b by the iteration of Richardson (1911), for any A of which it contracts.

    .. math:: x_{k+1} = x_k - \eta (A x_k - b), \qquad
              x_k - x^* = (I - \eta A)^k (x_0 - x^*)

    It converges if all eigenvalues of A lie in the open disc of radius 1/eta around 1/eta: for
    symmetric A, if 0 < A < 2/eta; for A = I - Phi' with a contraction Phi, with eta = 1. The
    adjoint method "fixed point" of Grazzi et al. (ICML 2020, section 2) is this with eta = 1;
    theirs stops when x no longer moves, this one when the residual is small.

    Args:
        product: x -> A x; A need not be symmetric.
        right: b, a tuple of tensors.
        step_size: eta > 0.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: products at most, one per step.
        start: x_0; None is zero.

    Returns:
        The last iterate with its true residual. One with a larger residual than x = 0 and
        the start have is divergence: the value is NaN and ``converged`` is False.

    Example:
        >>> import torch
        >>> A = torch.tensor([[1.0, -0.5], [0.5, 1.0]])
        >>> solution = fixed_point(lambda x: (A @ x[0],), (torch.tensor([0.5, 1.5]),))
        >>> solution.value[0].round(decimals=4)
        tensor([1., 1.])
    """
    value = scale(right, 0.0) if start is None else start
    residual, products = first_residual(product, right, start), 0
    first = float(norm(residual))
    bound = tolerance * float(norm(right))
    while products < max_iterations and bound < float(norm(residual)) < math.inf:
        value = axpy(step_size, residual, value)
        residual = axpy(-1.0, product(value), right)
        products += 1
    return ended(value, residual, right, products, tolerance, first=first, remedy=_REMEDY)


def neumann(
    product: Product,
    right: Tensors,
    *,
    step_size: float = 1.0,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    start: Tensors | None = None,
) -> Solution:
    r"""Solve A x = b by the series of Neumann, under the conditions of ``fixed_point``.

    .. math:: x_K = x_0 + \eta \sum_{k=0}^{K} (I - \eta A)^k (b - A x_0)

    K products give K + 1 terms, so from zero this is iterate K + 1 of ``fixed_point``, with the
    residual known one product earlier: it is the next term over eta. Source: Lorraine, Vicol &
    Duvenaud (2020), algorithm 3, who start from zero and take a fixed K.

    Args:
        product: x -> A x; A need not be symmetric.
        right: b, a tuple of tensors.
        step_size: eta > 0.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: K at most.
        start: x_0; None is zero.

    Returns:
        As ``fixed_point``.

    Example:
        >>> import torch
        >>> A = torch.tensor([0.5, 1.0])
        >>> solve = lambda k: neumann(lambda x: (A * x[0],), (torch.ones(2),), max_iterations=k)
        >>> solve(1).value[0], solve(30).value[0].round(decimals=4)  # 1 + 1/2; 2
        (tensor([1.5000, 1.0000]), tensor([2., 1.]))
    """
    term, products = first_residual(product, right, start), 0
    first = float(norm(term))
    value = axpy(step_size, term, scale(right, 0.0) if start is None else start)
    bound = tolerance * float(norm(right))
    while products < max_iterations and bound < float(norm(term)) < math.inf:
        term = axpy(-step_size, product(term), term)
        value = axpy(step_size, term, value)
        products += 1
    residual = axpy(-1.0, product(value), right)
    return ended(value, residual, right, products, tolerance, first=first, remedy=_REMEDY)
