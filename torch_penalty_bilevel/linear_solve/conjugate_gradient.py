"""Conjugate gradients: symmetric positive definite systems, and least squares for any other."""

from __future__ import annotations

import math

import torch

from ..tensors import Tensors, axpy, coarsest_eps, dot, norm, scale
from .solution import NOT_FINITE as _NOT_FINITE
from .solution import Product, Solution, broken, first_residual, stopped


def conjugate_gradient(
    product: Product,
    right: Tensors,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    start: Tensors | None = None,
) -> Solution:
    r"""Solve A x = b for symmetric positive definite A (Hestenes & Stiefel, 1952).

    The residual is recomputed from its definition before convergence is believed, since the
    recursively updated one drifts away from it; if they disagree, the method restarts there.

    Args:
        product: x -> A x.
        right: b, a tuple of tensors.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: products at most; None: ten times the number of unknowns (in exact
            arithmetic one time is enough).
        start: x_0, for one product more; None is zero.

    Returns:
        The last iterate with its true residual. At a direction of curvature <= 0 up to rounding,
        which says that A is not positive definite, it stops: NaN, with status
        ``"negative_curvature"``.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> solution = conjugate_gradient(lambda x: (A @ x[0],), (torch.tensor([3.0, 4.0]),))
        >>> solution.value[0].round(decimals=4)
        tensor([1., 1.])
    """
    limit = max_iterations or 10 * sum(b.numel() for b in right)
    value = scale(right, 0.0) if start is None else start
    residual = direction = first_residual(product, right, start)
    exact = True  # is ``residual`` the true one, not the recursion's?
    square = float(dot(residual, residual))
    bound = (tolerance * float(norm(right))) ** 2
    products, largest, eps = 0, 0.0, coarsest_eps(right)
    while products < limit and not (exact and square <= bound):
        if square <= bound:  # so far only the recursion says so: look, and restart if it is wrong
            residual = direction = axpy(-1.0, product(value), right)
            square, exact = float(dot(residual, residual)), True
            products += square > bound
            continue
        curved = product(direction)
        products += 1
        pair = dot(direction, curved), dot(direction, direction)
        curvature, length = torch.stack(pair).tolist()
        if not math.isfinite(curvature):
            return broken(right, products, "not_finite", _NOT_FINITE)
        along = curvature / (length or 1.0)
        largest = max(largest, along)
        # The product itself is known to eps ||A||: what is less may as well be below zero, and a
        # direction of the kernel, but for rounding, would throw x out to infinity.
        if not along > eps * largest:
            return broken(right, products, "negative_curvature", _breakdown(along))
        step = square / curvature
        value = axpy(step, direction, value)
        residual, exact = axpy(-step, curved, residual), False
        previous, square = square, float(dot(residual, residual))
        direction = axpy(square / previous, direction, residual)
    if not exact:
        residual = axpy(-1.0, product(value), right)
        square = float(dot(residual, residual))
    error = math.sqrt(square)
    if not math.isfinite(error):
        return broken(right, products, "not_finite", _NOT_FINITE)
    if square <= bound:
        return Solution(value, products, error, "converged", "converged")
    return Solution(value, products, error, "unfinished", stopped(products, error, tolerance))


def least_squares(
    product: Product,
    right: Tensors,
    *,
    transposed: Product | None = None,
    conjugate: bool = True,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    start: Tensors | None = None,
) -> Solution:
    r"""Minimise ||A x - b||_2 for any A: CG on the normal equations A'A x = A'b.

    .. math:: s = A'(b - Ax), \quad \alpha = \frac{\langle s, s\rangle}{\lVert Ap\rVert^2}, \quad
              x \mathrel{+}= \alpha p, \quad p \leftarrow s' +
              \frac{\langle s', s'\rangle}{\langle s, s\rangle} p

    Slower than ``conjugate_gradient`` (the condition number is squared, two products per
    iteration), but it cannot break down. Source: Hestenes & Stiefel (1952), section 10, in the form
    of Paige & Saunders (1982), where A'A is never formed.

    Args:
        product: x -> A x.
        right: b, a tuple of tensors.
        transposed: y -> A'y; None: A is symmetric, of any signs.
        conjugate: False takes p = s always, gradient steps with the best length for the same two
            products: slow, for comparisons.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: products at most, in pairs; None: twenty times the number of unknowns.
        start: x_0, for one product more; None is zero.

    Returns:
        The last iterate with its true residual. Where b is not in the range of A, ``converged`` is
        False: there is no solution. A product that is not finite is a breakdown: NaN.

    Example:
        >>> import torch
        >>> A = torch.tensor([2.0, -1.0])
        >>> least_squares(lambda x: (A * x[0],), (torch.tensor([2.0, 2.0]),)).value[0]
        tensor([ 1., -2.])
    """
    limit = max_iterations or 20 * sum(b.numel() for b in right)
    value = scale(right, 0.0) if start is None else start
    residual = first_residual(product, right, start)
    pull_back = transposed or product
    goal = tolerance * float(norm(right))
    products, previous, direction, least = 0, 0.0, value, False
    while products + 2 <= limit and float(norm(residual)) > goal:
        ascent = pull_back(residual)
        square = float(dot(ascent, ascent))
        if not square > 0:  # b - A x is orthogonal to the range of A: no x is better
            least = square == 0
            break
        follow = conjugate and previous > 0
        direction = axpy(square / previous, direction, ascent) if follow else ascent
        curved = product(direction)
        products += 2
        step = square / float(dot(curved, curved))
        value, residual = axpy(step, direction, value), axpy(-step, curved, residual)
        previous = square
    error = float(norm(axpy(-1.0, product(value), right)))
    if not math.isfinite(error):
        return broken(right, products, "not_finite", _NOT_FINITE)
    # The recursion drifts from the definition by rounding: ten times the bound is still believed.
    if error <= 10 * goal < math.inf:
        return Solution(value, products, error, "converged", "converged")
    message = (
        f"least squares stopped at ||b - A x|| = {error:.1e} > {tolerance:.1e} * ||b|| after "
        f"{products} products; raise max_iterations or tolerance, or there is no solution"
    )
    return Solution(value, products, error, "no_solution" if least else "unfinished", message)


def _breakdown(along: float) -> str:
    """What to say of <d, A d> / <d, d> <= 0: some eigenvalue of A is at most that."""
    return (
        f"curvature {along:.3g} (<d, H d> / <d, d>) along a search direction d: the Hessian is not "
        "positive definite there, up to rounding; minimise the lower level further, add damping "
        f"above {max(0.0, -along):.3g}, or weight decay to g (v of a network may stay near a "
        'saddle), or take method="cg_normal", which needs no sign'
    )
