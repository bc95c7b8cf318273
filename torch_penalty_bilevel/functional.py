"""The functional core: penalty gradients and hypergradients of pure functions, on torch.func.

``upper`` and ``lower`` are pytrees of tensors (a dict from ``named_parameters()`` goes straight
into ``torch.func.functional_call``); results have the same structure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .curvature import Linearised, Loss, Map, VectorJacobian
from .errors import BilevelWarning
from .hypergradients import HypergradientInfo as HypergradientInfo
from .hypergradients import (
    LocalProblem,
    MethodOptions,
    check_method,
    check_options,
    pure_hypergradient,
)
from .linear_solve import MakeOptimizer
from .penalties import Losses
from .pytrees import Structure, Tree
from .tensors import OptionalPair, Pair, Tensors, cast_like, filled, sum_of_optional

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
        >>> import torch
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
    indirect = linearised.product(adjoint)
    upper_grad = filled(sum_of_optional(direct.upper, indirect.upper), flat.at.upper)
    slope = filled(sum_of_optional(direct.lower, indirect.lower), flat.at.lower)
    # Plain arithmetic: torch.func.vmap has no batching rules for the foreach kernels.
    lower_grad = tuple(a + damping * r for a, r in zip(slope, residual, strict=True))
    return PenaltyGradient(
        flat.upper.tree(upper_grad),
        flat.lower.tree(lower_grad),
        flat.lower.tree(residual),
        f,
        linearised.loss,
    )


def hypergradient(
    upper_loss: PureLoss[U, V],
    lower_loss: PureLoss[U, V] | Callable[[U, V], V],
    upper: U,
    lower: V,
    *,
    method: str = "cg",
    lower_is_map: bool = False,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float | None = None,
    start: V | None = None,
    step_size: float | None = None,
    lower_steps: int | None = None,
    truncation: int | None = None,
    linear_optimizer: MakeOptimizer | None = None,
    samples: int | None = None,
) -> tuple[U, HypergradientInfo]:
    r"""The hypergradient of f(u, v*(u)), v* minimising g(u, .) or v* = Phi(u, v*), by any method.

    .. math:: \nabla_u f + J q, \qquad (H + \lambda I) q = -\nabla_v f

    With a map, here and below, H is (I - dPhi/dv)', which need not be symmetric, and J is
    -(dPhi/du)'. Options that a method does not have are refused.

    Solving for q at the given v, with ``tolerance, max_iterations, damping, start``:

    - ``"cg"``: conjugate gradients; H + lambda I symmetric positive definite.
    - ``"cg_normal"``: conjugate gradients on the normal equations; any H.
    - ``"neumann"`` (also ``step_size``): Neumann series; H of a loss below 2 / eta, or a
      contraction.
    - ``"fixed_point"`` (also ``step_size``): fixed-point iteration, likewise.
    - ``"stochastic"`` (also ``step_size, linear_optimizer, samples``): a torch optimizer, SGD(lr =
      eta) by default, on the linear system, with the lower loss called anew for every product.
    - ``"approx_grad"`` (also ``linear_optimizer``): gradient steps on ||H q + grad_v f||^2, of the
      best length by default (ApproxGrad of Mehra & Hamm, 2021).

    Differentiating T steps v <- v - eta grad_v g, or v <- v - eta (v - Phi(u, v)), from the given
    v, with ``tolerance, step_size, lower_steps``:

    - ``"reverse"`` (also ``truncation``): with recomputation; memory for T copies of v.
    - ``"forward"``: dv/du carried along; memory and time for n_u copies of v.

    Without solving: ``"one_step"`` (``tolerance, step_size``), q = -eta grad_v f (T1-T2, Luketina
    et al., 2016); ``"alternating"``, q = 0. Rates of the others: Grazzi et al. (ICML 2020).

    Args:
        upper_loss: f(upper, lower), 0-d.
        lower_loss: g(upper, lower), 0-d; with ``lower_is_map`` Phi, structured like ``lower``.
        upper: pytree u.
        lower: pytree v; not modified.
        method: see above.
        lower_is_map: the lower level is the fixed point of a map.
        tolerance: bound on ||(H + lambda I) q + grad_v f||_2 / ||grad_v f||_2; None: 1e-10, or
            100 times the precision of the lower level's dtype where that is larger.
        max_iterations: products at most (steps of ``linear_optimizer``); None: ten times the number
            of unknowns for ``cg``, twenty times for ``cg_normal``, 1000 for others.
        damping: lambda >= 0 above, None is 0; biases the result by O(lambda).
        start: q to start from; None is zero.
        step_size: eta; None: 1 for a map, 1 / ||H||_2 for a loss, by at most 20 more products.
        lower_steps: T; None is 100.
        truncation: go back through the last so many steps only; None: through all.
        linear_optimizer: makes a torch optimizer from a list of tensors, the unknown q.
        samples: J, products averaged in each step, and samples of J q.

    Returns:
        The hypergradient with the structure of ``upper``, and how it ended. If that was early,
        ``info.converged`` is False, ``info.status`` names the end and a ``BilevelWarning`` says why
        (``one_step`` and ``alternating``, early by design, do not warn); after a breakdown, as
        ``"negative_curvature"``, the hypergradient is NaN.

    Raises:
        TypeError: leaves that are not floating-point tensors; or called inside ``torch.func.vmap``
            or ``torch.func.grad``, also of what the losses close over: how long a method runs
            depends on values. Many problems at once: the sum of their losses, whose H is block
            diagonal, has the hypergradients of all.
        ValueError: an unknown method, or an option that the method does not have or out of range.
        NonFiniteError: the losses or their gradients are not finite at (u, v), or where the lower
            steps lead.

    Example:
        >>> import torch
        >>> u, v = torch.tensor(1.0), torch.tensor(1.0)   # v minimises g(u, .) = (v - u)^2
        >>> gradient, info = hypergradient(lambda u, v: u * v, lambda u, v: (v - u) ** 2, u, v)
        >>> gradient, info.converged                        # d/du of u * v(u) = u^2
        (tensor(2.), True)
        >>> gradient, info = hypergradient(
        ...     lambda u, v: v**2, lambda u, v: v / 2 + u, u, torch.tensor(2.0),
        ...     lower_is_map=True, method="cg_normal",
        ... )
        >>> gradient, info.converged                        # v(u) = 2 u, d/du of 4 u^2
        (tensor(8.), True)
    """
    check_method(method)
    flat = _Flat(upper_loss, lower_loss, upper, lower, lower_is_map=lower_is_map)
    _refuse_transforms((*flat.at.upper, *flat.at.lower))
    options = MethodOptions(
        tolerance=tolerance,
        max_iterations=max_iterations,
        damping=damping,
        start=None if start is None else tuple(flat.lower.leaves_of("start", start)),
        step_size=step_size,
        lower_steps=lower_steps,
        truncation=truncation,
        linear_optimizer=linear_optimizer,
        samples=samples,
    )
    check_options(method, options)
    at = Pair(tuple(t.detach() for t in flat.at.upper), tuple(t.detach() for t in flat.at.lower))
    losses = Losses(flat.upper_loss, flat.lower_loss)
    problem = LocalProblem(losses, at, _Outermost(), lower_is_map=lower_is_map)
    with torch.no_grad():  # tensors that the losses close over may require gradients
        total, info = pure_hypergradient(problem, method, options)
    if not info.converged and method not in ("one_step", "alternating"):
        warnings.warn(f"hypergradient: {info.message}", BilevelWarning, stacklevel=2)
    if info.adjoint is not None:
        info = info._replace(adjoint=flat.lower.tree(cast_like(info.adjoint, at.lower)))
    return flat.upper.tree(cast_like(total, at.upper)), info


class _Outermost(VectorJacobian):
    """Refuses losses in which a transformation takes part that began outside of this call."""

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        value, found = super().gradient(loss, at)
        _refuse_transforms((value,))
        return value, found

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        found = super().linearise(loss, at, reusable=reusable)
        _refuse_transforms((found.loss,))
        return found

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        found = super().linearise_map(phi, at, reusable=reusable)
        _refuse_transforms((found.loss,))
        return found


def _refuse_transforms(tensors: Tensors) -> None:
    functorch = cast(Any, torch._C)._functorch
    if any(functorch.is_batchedtensor(t) for t in tensors):
        raise TypeError(
            "hypergradient does not run inside torch.func.vmap: how long its solver runs depends "
            "on values. Give it the sum of the problems instead, which has the hypergradient of "
            "each: hypergradient(lambda u, v: torch.func.vmap(f)(u, v).sum(), lambda u, v: "
            "torch.func.vmap(g)(u, v).sum(), u, v, ...), u and v stacked; or call it in a loop"
        )
    is_dual = (unpack_dual(t).tangent is not None for t in tensors)
    if any(functorch.is_gradtrackingtensor(t) for t in tensors) or any(is_dual):
        raise TypeError(
            "hypergradient does not run inside torch.func.grad, vjp or jvp, nor on dual tensors: "
            "its result is not differentiated further, and their answer would be 0 or miss a part. "
            "functional.penalty_gradient composes with them"
        )


class _Flat:
    """Both levels as tuples of tensors, and losses of tuples."""

    def __init__(
        self, upper_loss: Any, lower: Any, u: Tree, v: Tree, *, lower_is_map: bool = False
    ) -> None:
        self.upper, self.lower = Structure("upper", u), Structure("lower", v)
        self.at = Pair(tuple(self.upper.leaves), tuple(self.lower.leaves))
        self.upper_loss = self._flattened(upper_loss)
        phi = self._flattened(lower)
        self.lower_loss: Any = phi
        if lower_is_map:
            name = "Phi(upper, lower)"
            self.lower_loss = lambda u, v: tuple(self.lower.leaves_of(name, phi(u, v)))

    def _flattened(self, loss: Any) -> Callable[[Tensors, Tensors], Any]:
        return lambda u, v: loss(self.upper.tree(u), self.lower.tree(v))
