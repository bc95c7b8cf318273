"""Exact hypergradients to judge an estimate by, and the error of an estimate.

With r = grad_v g, H = d2g/dv2 and J = d2g/du dv, of all the data:

    exact here:    h = grad_u f - J H^+ grad_v f at the (u, v) of the estimate
    exact, solved: the same at (u, v*(u)), the gradient of f(u, v*(u))

H^+ is the pseudo-inverse: where H is singular, q is the shortest least-squares solution and what of
grad_v f lies in the null space of H counts as nothing. J maps that null space to 0 where g is
convex in (u, v) together, so that h does not depend on which solution it is; at the optimistic
v*(u) that part of grad_v f is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_penalty_bilevel import functional

Loss = Callable[[Tensor, Tensor], Tensor]

# Eigenvalues of H below this part of the largest count as 0. What rounding makes of 0 is below
# 1e-15 of it; the least others are those of the digits, e^u.
_NULL = 1e-12
_NOISE = 1e-13


class Hypergradient(NamedTuple):
    """grad_u f + J q, and how exact its sum is."""

    value: Tensor
    noise: float
    """What rounding may leave where the two terms cancel."""


def with_adjoint(f: Loss, g: Loss, u: Tensor, v: Tensor, q: Tensor) -> Hypergradient:
    """grad_u f + J q at (u, v)."""
    u, v = (t.detach().requires_grad_() for t in (u, v))
    (direct,) = torch.autograd.grad(f(u, v), u, allow_unused=True, materialize_grads=True)
    (residual,) = torch.autograd.grad(g(u, v), v, create_graph=True)
    (indirect,) = torch.autograd.grad((residual * q.to(v).detach()).sum(), u)
    noise = _NOISE * float(direct.norm() + indirect.norm())
    return Hypergradient(direct + indirect, noise)


def lower_hessian(g: Loss, u: Tensor, v: Tensor) -> Tensor:
    """H as a matrix."""
    u, flat = u.detach(), v.detach().reshape(-1)
    return torch.func.hessian(lambda w: g(u, w.reshape(v.shape)))(flat)  # type: ignore[no-any-return]


def exact_adjoint(f: Loss, hessian: Loss, u: Tensor, v: Tensor) -> Tensor:
    """-H^+ grad_v f, shaped like v, by all eigenvalues of H = ``hessian(u, v)``."""
    u, v = u.detach(), v.detach()
    slope = torch.func.grad(f, argnums=1)(u, v).reshape(-1)
    values, vectors = torch.linalg.eigh(hessian(u, v))
    kept = values.abs() > _NULL * values.abs().max()
    q = -vectors[:, kept] @ ((vectors[:, kept].T @ slope) / values[kept])
    return q.reshape(v.shape)


def damped_adjoint(f: Loss, g: Loss, u: Tensor, v: Tensor, damping: float) -> Tensor:
    """-(H + damping)^-1 grad_v f by conjugate gradients to 1e-3, for v that are too long for H."""
    point = u.detach(), v.detach()
    _, info = functional.hypergradient(
        f, g, *point, method="cg", damping=damping, tolerance=1e-3, max_iterations=2000
    )
    return info.adjoint  # type: ignore[no-any-return]


def error(estimate: Hypergradient, reference: Hypergradient) -> float:
    """||estimate - h|| / max(||estimate||, ||h||), from 0 to 2; 0 where both are rounding."""
    largest = max(float(estimate.value.norm()), float(reference.value.norm()))
    if largest <= max(estimate.noise, reference.noise):
        return 0.0
    return float((estimate.value - reference.value).norm()) / largest


def solve_lower(g: Loss, hessian: Loss, u: Tensor, v: Tensor, tolerance: float = 1e-11) -> Tensor:
    """The minimiser of g(u, .), strictly convex, by Newton steps from v, halved until g falls.

    Raises:
        RuntimeError: ||grad_v g|| is above ``tolerance`` after 100 steps.
    """
    u, v = u.detach(), v.detach()
    size = math.inf
    for _ in range(100):
        slope, before = torch.func.grad_and_value(g, argnums=1)(u, v)
        size = float(slope.norm())
        if size <= tolerance:
            return v
        move = -torch.linalg.solve(hessian(u, v), slope.reshape(-1)).reshape(v.shape)
        # Near the minimum g differs by rounding only.
        bound = before + 1e-14 * before.abs()
        while g(u, v + move) > bound and move.norm() > 1e-14 * v.norm():
            move = move / 2
        v = v + move
    raise RuntimeError(f"the lower level is not solved: ||grad_v g|| = {size:.1e}")
