"""The lower level solved again, so that u is judged by what it is worth and not by a running v."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
ROUNDS = 5


def settled(
    g: Loss, u: Tensor, v: Tensor, unit: Tensor | float = 1.0, tolerance: float = 1e-9
) -> Tensor:
    """A minimiser of g(u, .) that L-BFGS reaches from ``v``; of a quadratic g the nearest one.

    Gradients of a quadratic g lie in the range of its Hessian, and so do L-BFGS's moves: what g
    leaves free stays as it is in ``v``.

    Args:
        g: the lower loss.
        u: the upper variables.
        v: the start.
        unit: unknowns are measured in it, elementwise; about 1 / sqrt(curvature) is fast. With
            ``unit`` other than a constant the minimiser is the nearest in that metric.
        tolerance: on the largest entry of the gradient, in those units.
    """
    u, v = u.detach(), v.detach()

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = (torch.from_numpy(flat).view_as(v) * unit).requires_grad_()
        loss = g(u, point)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), (gradient * unit).numpy().ravel()

    x = (v / unit).numpy().ravel().copy()
    options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30}
    options |= {"gtol": tolerance, "ftol": 1e-4 * tolerance}
    size = math.inf
    for _ in range(ROUNDS):  # its line search gives up early now and then; a fresh one goes on
        end = minimize(value, x, jac=True, method="L-BFGS-B", options=options)
        before, size, x = size, float(np.abs(end.jac).max()), end.x
        if size <= tolerance or size > 0.5 * before:
            break
    return torch.from_numpy(x).view_as(v) * unit
