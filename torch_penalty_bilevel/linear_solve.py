"""Linear solvers on tuples of tensors, for symmetric systems given as a product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import Tensors, axpy, dot, norm, scale


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


def conjugate_gradient(
    product: Callable[[Tensors], Tensors],
    right: Tensors,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
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

    Returns:
        The last iterate with its true residual. A direction of non-positive curvature (A is not
        positive definite) is a breakdown: the value is NaN and ``converged`` is False.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> solution = conjugate_gradient(lambda x: (A @ x[0],), (torch.tensor([3.0, 4.0]),))
        >>> solution.value[0].round(decimals=4)
        tensor([1., 1.])
    """
    limit = max_iterations or 10 * sum(b.numel() for b in right)
    value = scale(right, 0.0)
    residual = direction = right
    exact = True  # is ``residual`` the true one, not the recursion's?
    square = float(dot(residual, residual))
    bound = (tolerance * float(norm(right))) ** 2
    products = 0
    while products < limit and not (exact and square <= bound):
        if square <= bound:  # so far only the recursion says so: look, and restart if it is wrong
            residual = direction = axpy(-1.0, product(value), right)
            square, exact = float(dot(residual, residual)), True
            products += square > bound
            continue
        curved = product(direction)
        products += 1
        curvature = float(dot(direction, curved))
        if not curvature > 0:
            nan = scale(right, float("nan"))
            return Solution(nan, products, float("nan"), False, _breakdown(curvature))
        step = square / curvature
        value = axpy(step, direction, value)
        residual, exact = axpy(-step, curved, residual), False
        previous, square = square, float(dot(residual, residual))
        direction = axpy(square / previous, direction, residual)
    if not exact:
        residual = axpy(-1.0, product(value), right)
        square = float(dot(residual, residual))
    error = math.sqrt(square)
    converged = square <= bound
    message = (
        "converged"
        if converged
        else (
            f"stopped after {products} products with ||b - A x|| = {error:.1e} > "
            f"{tolerance:.1e} * ||b||; "
            "raise max_iterations or tolerance, or add damping"
        )
    )
    return Solution(value, products, error, converged, message)


def least_squares(
    product: Callable[[Tensors], Tensors],
    right: Tensors,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
) -> Solution:
    r"""Minimise ||A x - b||_2 for symmetric A of any signs: CG on A A x = A b.

    .. math:: s = A(b - Ax), \quad \alpha = \frac{\langle s, s\rangle}{\lVert Ap\rVert^2}, \quad
              x \mathrel{+}= \alpha p, \quad p \leftarrow s' +
              \frac{\langle s', s'\rangle}{\langle s, s\rangle} p

    Slower than ``conjugate_gradient`` (the condition number is squared, two products per
    iteration), but it cannot break down. Source: Hestenes & Stiefel (1952), section 10, in the form
    of Paige & Saunders (1982), where A A is never formed.

    Args:
        product: x -> A x.
        right: b, a tuple of tensors.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: products at most, in pairs; None: twenty times the number of unknowns.

    Returns:
        The last iterate with its true residual. Where b is not in the range of A, ``converged`` is
        False: there is no solution.

    Example:
        >>> import torch
        >>> A = torch.tensor([2.0, -1.0])
        >>> least_squares(lambda x: (A * x[0],), (torch.tensor([2.0, 2.0]),)).value[0]
        tensor([ 1., -2.])
    """
    limit = max_iterations or 20 * sum(b.numel() for b in right)
    value, residual = scale(right, 0.0), right
    goal = tolerance * float(norm(right))
    products, previous, direction = 0, 0.0, value
    while products + 2 <= limit and float(norm(residual)) > goal:
        ascent = product(residual)
        square = float(dot(ascent, ascent))
        if not square > 0:
            break  # b - A x is orthogonal to the range of A: no x is better
        direction = axpy(square / previous, direction, ascent) if previous else ascent
        curved = product(direction)
        products += 2
        step = square / float(dot(curved, curved))
        value, residual = axpy(step, direction, value), axpy(-step, curved, residual)
        previous = square
    error = float(norm(axpy(-1.0, product(value), right)))
    # The recursion drifts from the definition by rounding: ten times the bound is still believed.
    converged = error <= 10 * goal
    message = "converged" if converged else f"least squares stopped at ||b - A x|| = {error:.1e}"
    return Solution(value, products, error, converged, message)


def _breakdown(curvature: float) -> str:
    return (
        f"curvature {curvature:.3g} along a search direction: the Hessian is not positive definite "
        "there; minimise the lower level further, or add damping"
    )


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
