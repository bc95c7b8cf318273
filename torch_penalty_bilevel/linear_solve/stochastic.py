"""Any torch optimizer on a linear system whose product may be a random sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from ..tensors import Tensors, add, axpy, norm, scale
from .solution import Product, Solution, ended

MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
"""Tensors -> a fresh torch optimizer over them."""


def stochastic(
    product: Product,
    right: Tensors,
    *,
    optimizer: MakeOptimizer,
    transposed: Product | None = None,
    samples: int = 1,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    start: Tensors | None = None,
) -> Solution:
    r"""Let ``optimizer`` step on A x = b, with A seen through samples A_1, A_2, ... of mean A.

    .. math:: d = \tfrac1J \sum_{j=1}^{J} A_j x - b, \qquad x \leftarrow \text{optimizer}(d)

    With SGD this is the stochastic fixed-point iteration of Grazzi, Salzo & Pontil (AISTATS 2021,
    section 4); d is the gradient of x'Ax/2 - b'x where A is symmetric. With ``transposed`` the
    direction is A'd, the gradient of ||A x - b||^2 / 2, which is ApproxGrad of Mehra & Hamm
    (2021, section 3) with their Adam (theirs has no factor 1/2, and its moments live on).

    Args:
        product: x -> A_j x, perhaps another sample in every call.
        right: b, a tuple of tensors.
        optimizer: makes a torch optimizer over the unknowns.
        transposed: y -> A'y, for least squares; None steps on d itself.
        samples: J, products averaged in every step.
        tolerance: bound on ||b - A x||_2 / ||b||_2.
        max_iterations: steps at most; d costs J products, A'd one more.
        start: x_0; None is zero.

    Returns:
        The last iterate. ``residual_norm`` is measured on J further samples: exact if the product
        always is the same. A residual a thousand times that of x = 0 is divergence: NaN.

    Raises:
        TypeError: ``optimizer`` does not make an optimizer.

    Example:
        >>> import torch
        >>> A = torch.tensor([2.0, 1.0])
        >>> solution = stochastic(
        ...     lambda x: (A * x[0],), (torch.tensor([2.0, 2.0]),),
        ...     optimizer=lambda x: torch.optim.SGD(x, lr=0.5), tolerance=1e-5,
        ... )
        >>> solution.value[0].round(decimals=4)
        tensor([1., 2.])
    """
    unknowns = [t.clone() for t in (scale(right, 0.0) if start is None else start)]
    rule: Any = optimizer(unknowns)
    if not isinstance(rule, Optimizer):
        raise TypeError(f"the factory of an optimizer made {type(rule).__name__}")
    value, products = tuple(unknowns), 0
    size = float(norm(right))
    direction = _direction(product, right, value, samples)
    for _ in range(max_iterations):
        if not tolerance * size < float(norm(direction)) < math.inf:
            break
        slope = direction if transposed is None else transposed(direction)
        for unknown, gradient in zip(unknowns, slope, strict=True):
            unknown.grad = gradient
        rule.step()
        direction = _direction(product, right, value, samples)
        products += samples + (transposed is not None)
    return ended(
        tuple(t.detach() for t in value),
        direction,
        right,
        products,
        tolerance,
        worst=1e3,
        remedy="lower the learning rate of the optimizer on the linear system",
    )


def _direction(product: Product, right: Tensors, value: Tensors, samples: int) -> Tensors:
    """The mean of ``samples`` products, less b."""
    total = product(value)
    for _ in range(samples - 1):
        total = add(total, product(value))
    return axpy(-1.0, right, scale(total, 1.0 / samples))
