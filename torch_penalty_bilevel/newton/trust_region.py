"""The trust-region subproblem, by truncated conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLAT = 4 * torch.finfo(torch.float64).eps


class Step(NamedTuple):
    """What ``steihaug`` ends with."""

    value: Tensor
    decrease: float
    """Of the quadratic model, >= 0."""
    interior: bool
    """A (truncated) Newton step, not cut by the trust region."""
    curvature: float
    """The largest |d'Bd| / d'Md seen."""


def steihaug(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    radius: float,
    *,
    tolerance: float,
    limit: int,
    precondition: Callable[[Tensor], Tensor] = lambda x: x,
    largest: float = 0.0,
    flat: float = FLAT,
) -> Step:
    r"""Minimise <gradient, s> + <s, B s> / 2 over ||s|| <= radius (Steihaug, 1983).

    Curvatures d'Bd / d'Md under ``flat`` times the largest one are rounding: the step does not go
    there.

    Args:
        product: s -> B s, B symmetric, perhaps indefinite.
        gradient: of the function at s = 0.
        radius: bounds ||s||_2.
        tolerance: stop when the residual's norm has fallen by this factor, in the metric of M^-1.
        limit: products at most.
        precondition: x -> M^-1 x, positive definite; the identity by default.
        largest: the largest curvature known so far.
        flat: relative size of a curvature that counts as zero.

    Example:
        >>> B = torch.tensor([2.0, 4.0])
        >>> steihaug(lambda s: B * s, torch.tensor([2.0, 4.0]), 9.0, tolerance=1e-9, limit=9).value
        tensor([-1., -1.])
    """
    s, residual = torch.zeros_like(gradient), -gradient
    towards = precondition(residual)
    d, rho = towards, float(residual @ towards)
    start, metric, decrease = rho, rho, 0.0
    for _ in range(limit):
        if not rho > tolerance**2 * start:
            break
        Bd = product(d)
        curvature = float(d @ Bd)
        largest = max(largest, abs(curvature) / metric)
        linear = largest == 0  # no curvature anywhere yet: a linear function, not rounding
        if abs(curvature) <= flat * largest * metric and not linear:
            break
        step = rho / curvature if curvature > 0 else math.inf
        if curvature <= 0 or float((s + step * d).norm()) > radius:
            step = to_boundary(s, d, radius)
            decrease += step * rho - step**2 * curvature / 2
            return Step(s + step * d, decrease, False, largest)
        s = s + step * d
        decrease += step * rho / 2
        residual = residual - step * Bd
        towards = precondition(residual)
        previous, rho = rho, float(residual @ towards)
        d, metric = towards + (rho / previous) * d, rho + (rho / previous) ** 2 * metric
    return Step(s, decrease, True, largest)


def to_boundary(s: Tensor, d: Tensor, radius: float) -> float:
    """The positive t with ||s + t d|| = radius.

    Example:
        >>> to_boundary(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]), 5.0)
        2.0
    """
    a, b, c = float(d @ d), float(s @ d), float(s @ s) - radius**2
    return (-b + math.sqrt(max(0.0, b * b - a * c))) / a
