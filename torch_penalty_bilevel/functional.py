"""The functional core: penalty gradients and hypergradients of pure functions, on torch.func.

``upper`` and ``lower`` are pytrees of tensors (a dict from ``named_parameters()`` goes straight
into ``torch.func.functional_call``); results have the same structure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .curvature import Linearised, VectorJacobian
from .errors import BilevelWarning, NonFiniteError
from .linear_solve import conjugate_gradient
from .pytrees import Structure, Tree
from .tensors import OptionalPair, Pair, Tensors, filled

U = TypeVar("U")
V = TypeVar("V")
PureLoss: TypeAlias = Callable[[U, V], Tensor]


class PenaltyGradient(NamedTuple):
    """What ``penalty_gradient`` returns, in this order."""

    upper_grad: Tree
    lower_grad: Tree
    residual: Tree
    upper_loss: Tensor
    lower_loss: Tensor


class HypergradientInfo(NamedTuple):
    """How the linear solve behind a hypergradient ended."""

    iterations: int
    """Second-order products used."""
    residual_norm: float
    """||H q + grad_v f||_2 (not squared): the certificate."""
    converged: bool
    """Did the residual reach the tolerance?"""
    message: str
    """What happened and what to try."""
    adjoint: Tree
    """q, shaped like ``lower``; -(H + damping)^{-1} grad_v f when converged."""


def penalty_gradient(
    upper_loss: PureLoss[U, V],
    lower_loss: PureLoss[U, V],
    upper: U,
    lower: V,
    *,
    weight: float | Tensor,
    multiplier: V | None = None,
    damping: float | Tensor = 0.0,
) -> PenaltyGradient:
    r"""Gradients of the penalised functions of Mehra & Hamm (2021) by one vector-Jacobian product.

    .. math::
        F = f + \langle\nu, r\rangle + \tfrac{\gamma}{2}\lVert r\rVert^2, \quad
        F_{low} = F + \lambda g, \quad r = \nabla_v g, \quad q = \nu + \gamma r

    Pure: composes with ``torch.func.vmap``, ``torch.func.grad`` and
    ``torch.compile(fullgraph=True)``. Non-finite values pass through, as in any pure function.

    Args:
        upper_loss: f(upper, lower), 0-d.
        lower_loss: g(upper, lower), 0-d.
        upper: pytree u.
        lower: pytree v.
        weight: gamma, multiplies ||r||^2 / 2.
        multiplier: nu, shaped like ``lower``; None is zero.
        damping: lambda, multiplies g in F_low only.

    Returns:
        (grad_u F, grad_v F_low, r, f, g); the first three have the structure of their level.

    Example:
        >>> u, v = torch.tensor(1.0), torch.tensor(3.0)
        >>> f = lambda u, v: u * v
        >>> g = lambda u, v: (v - u) ** 2
        >>> result = penalty_gradient(f, g, u, v, weight=1.0)
        >>> result.residual, result.upper_grad, result.lower_grad  # r = 4, J = -2, H = 2
        (tensor(4.), tensor(-5.), tensor(9.))
    """
    flat = _Flat(upper_loss, lower_loss, upper, lower)
    engine = VectorJacobian()
    f, direct = engine.gradient(flat.upper_loss, flat.at)
    linearised = engine.linearise(flat.lower_loss, flat.at)
    residual = linearised.residual
    adjoint = tuple(weight * r for r in residual)
    if multiplier is not None:
        adjoint = tuple(
            m + q
            for m, q in zip(flat.lower.leaves_of("multiplier", multiplier), adjoint, strict=True)
        )
    upper_grad, lower_slope = _sum(direct, linearised.product(adjoint), flat.at)
    lower_grad = tuple(a + damping * r for a, r in zip(lower_slope, residual, strict=True))
    return PenaltyGradient(
        flat.upper.tree(upper_grad),
        flat.lower.tree(lower_grad),
        flat.lower.tree(residual),
        f,
        linearised.loss,
    )


def hypergradient(
    upper_loss: PureLoss[U, V],
    lower_loss: PureLoss[U, V],
    upper: U,
    lower: V,
    *,
    method: str = "cg",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float = 0.0,
) -> tuple[U, HypergradientInfo]:
    r"""Implicit differentiation at (u, v), where v should minimise g(u, .).

    .. math:: \nabla_u f + J q, \qquad (H + \lambda I) q = -\nabla_v f

    Args:
        upper_loss: f(upper, lower), 0-d.
        lower_loss: g(upper, lower), 0-d.
        upper: pytree u.
        lower: pytree v.
        method: ``"cg"``: conjugate gradients, for H + lambda I positive definite.
        tolerance: bound on ||(H + lambda I) q + grad_v f||_2 / ||grad_v f||_2; None: 1e-10, or
            100 times the precision of the lower level's dtype where that is larger.
        max_iterations: products at most; None: ten times the number of unknowns.
        damping: lambda >= 0 above; biases the result by O(lambda).

    Returns:
        The hypergradient with the structure of ``upper``, and how the solve ended. If it stopped
        early, ``info.converged`` is False and a ``BilevelWarning`` says why; after a breakdown the
        hypergradient is NaN.

    Raises:
        ValueError: an unknown method or an argument out of range.
        NonFiniteError: the losses or their gradients are not finite at (u, v).

    Example:
        >>> u, v = torch.tensor(1.0), torch.tensor(1.0)   # v minimises g(u, .) = (v - u)^2
        >>> gradient, info = hypergradient(lambda u, v: u * v, lambda u, v: (v - u) ** 2, u, v)
        >>> gradient, info.converged                        # d/du of u * v(u) = u^2
        (tensor(2.), True)
    """
    if method != "cg":
        raise ValueError(f"method must be one of ['cg'], got {method!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")
    if not damping >= 0:
        raise ValueError(f"damping must be >= 0, got {damping}")
    flat = _Flat(upper_loss, lower_loss, upper, lower)
    at = Pair(tuple(t.detach() for t in flat.at.upper), tuple(t.detach() for t in flat.at.lower))
    engine = VectorJacobian()
    f, direct = engine.gradient(flat.upper_loss, at)
    linearised = engine.linearise(flat.lower_loss, at)
    slope = filled(direct.lower, at.lower)
    _require_finite(f, linearised, (*filled(direct.upper, at.upper), *slope))

    def damped(q: Tensors) -> Tensors:
        product = filled(linearised.product(q).lower, at.lower)
        return tuple(h + damping * t for h, t in zip(product, q, strict=True))

    solution = conjugate_gradient(
        damped,
        tuple(-s for s in slope),
        tolerance=_reachable(slope) if tolerance is None else tolerance,
        max_iterations=max_iterations,
    )
    if not solution.converged:
        warnings.warn(f"hypergradient: {solution.message}", BilevelWarning, stacklevel=2)
    total = _sum(direct, linearised.product(solution.value), at).upper
    info = HypergradientInfo(
        solution.iterations,
        solution.residual_norm,
        solution.converged,
        solution.message,
        flat.lower.tree(solution.value),
    )
    return flat.upper.tree(total), info


def _sum(left: OptionalPair, right: OptionalPair, at: Pair) -> Pair:
    # Plain additions: torch.func.vmap has no batching rules for the foreach kernels.
    upper = zip(filled(left.upper, at.upper), filled(right.upper, at.upper), strict=True)
    lower = zip(filled(left.lower, at.lower), filled(right.lower, at.lower), strict=True)
    return Pair(tuple(a + b for a, b in upper), tuple(a + b for a, b in lower))


class _Flat:
    """Both levels and both losses on tuples of tensors."""

    def __init__(self, upper_loss: Any, lower_loss: Any, upper: Tree, lower: Tree) -> None:
        self.upper, self.lower = Structure("upper", upper), Structure("lower", lower)
        self.at = Pair(tuple(self.upper.leaves), tuple(self.lower.leaves))
        self.upper_loss = self._flattened(upper_loss)
        self.lower_loss = self._flattened(lower_loss)

    def _flattened(self, loss: Any) -> Callable[[Tensors, Tensors], Tensor]:
        return lambda u, v: loss(self.upper.tree(u), self.lower.tree(v))


def _reachable(slope: Tensors) -> float:
    return max(1e-10, *(100 * torch.finfo(s.dtype).eps for s in slope))


def _require_finite(f: Tensor, linearised: Linearised, gradient: Tensors) -> None:
    for label, block in (
        ("upper loss", (f,)),
        ("lower loss", (linearised.loss,)),
        ("gradient of the upper loss", gradient),
        ("residual grad_v g", linearised.residual),
    ):
        if not all(bool(torch.isfinite(t).all()) for t in block):
            raise NonFiniteError(f"hypergradient: {label} is not finite at this point")
