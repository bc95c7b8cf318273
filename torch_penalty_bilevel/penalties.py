"""The stationarity penalty: the lower problem replaced by grad_v g = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from .curvature import Curvature, Loss
from .dual import DualState, MultiplierRule
from .evaluation import Evaluation
from .faces import FacesOf, everywhere
from .multipliers import resolve as resolve_multiplier
from .tensors import (
    OptionalPair,
    OptionalTensors,
    Pair,
    Tensors,
    add,
    cast_like,
    filled,
    norms,
    sum_of,
)

Reduce: TypeAlias = Callable[[Tensors], Tensors]
"""Averages a tuple of tensors over the workers that share one problem; identity on one worker."""


class Losses(NamedTuple):
    """f, g, the set that v stays in, and inequalities."""

    upper: Loss
    lower: Loss
    lower_faces: FacesOf = everywhere
    upper_values: tuple[Loss, ...] = ()
    """h of each upper inequality: (upper, lower) -> a tensor of any shape."""
    lower_values: tuple[Loss, ...] = ()
    """h of each lower inequality."""


class Penalty(Protocol):
    """A formulation of the lower problem."""

    name: str
    rule: MultiplierRule

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        """All terms at one point."""
        ...


class Stationarity:
    r"""Penalise the violation of :math:`\nabla_v g = 0` (Mehra & Hamm, ACML 2021).

    .. math::
        F = f + \langle\nu, r\rangle + \tfrac{\gamma}{2}\lVert r\rVert^2, \qquad
        F_{low} = F + \lambda g, \qquad q = \nu + \gamma r

    .. math::
        \nabla_u F = \nabla_u f + J q, \qquad
        \nabla_v F_{low} = \nabla_v f + H q + \lambda r

    One product with q gives both blocks. If grad_v f + H q = e then
    q = -H^{-1}(grad_v f - e), so the upper gradient is the implicit hypergradient up to
    J H^{-1} e: ||e|| certifies it, and every step has it for nothing.

    With a constraint on the lower level r, q and a are projected onto the span of the critical
    face, and H acts with the curvature of its boundary (see ``constraints``).

    The residual is reduced over workers *before* the product: q is not linear in the data
    when gamma > 0, so averaging each worker's product instead would penalise each worker's own
    ||r||^2, a different function.

    Args:
        multiplier: how nu, gamma and lambda move: ``"least_squares"`` (default), ``"paper"``, or
            a configured ``LeastSquares(...)`` or ``EpsilonTest(...)``.
    """

    name = "stationarity"

    def __init__(self, multiplier: str | MultiplierRule = "least_squares") -> None:
        self.rule = resolve_multiplier(multiplier)

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        upper_loss, direct = curvature.gradient(losses.upper, at)
        linearised = curvature.linearise(losses.lower, at, reusable=self.rule.probes(state))
        full_residual = reduce(linearised.residual)
        face = losses.lower_faces(at.lower, full_residual)
        residual = face.tangent(full_residual)
        adjoint = face.tangent(self.rule.adjoint(state, residual))
        indirect = linearised.product(cast_like(adjoint, at.lower))
        product, slope, upper_grad = _reduced(indirect, direct, at, reduce)
        probe_product: Tensors = ()
        if self.rule.probes(state):
            probe = self.rule.probe(state, full_residual, slope)
            curved = linearised.product(cast_like(probe, at.lower)).lower
            probe_product = face.curved(reduce(filled(curved, at.lower)), probe)
        product = face.tangent(face.curved(product, adjoint))
        slope = face.tangent(slope)
        return Evaluation(
            upper_loss=upper_loss,
            lower_loss=linearised.loss,
            adjoint=adjoint,
            residual=residual,
            adjoint_residual=add(slope, product),
            upper_grad=upper_grad,
            slope_norms=norms(slope),
            product_norms=norms(product),
            probe_product=probe_product,
            lower_face=face,
        )


def _reduced(
    indirect: OptionalPair, direct: OptionalPair, at: Pair, reduce: Reduce
) -> tuple[Tensors, Tensors, OptionalTensors]:
    """(H q, grad_v f, grad_u f + J q), averaged over the workers in one call."""
    product = filled(indirect.lower, at.lower)
    slope = filled(direct.lower, at.lower)
    upper = tuple(_sum(f, g) for f, g in zip(direct.upper, indirect.upper, strict=True))
    present = tuple(t for t in upper if t is not None)
    n = len(at.lower)
    averaged = reduce((*product, *slope, *present))
    rest = iter(averaged[2 * n :])
    return averaged[:n], averaged[n : 2 * n], tuple(u if u is None else next(rest) for u in upper)


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return sum_of(left, right)


_BY_NAME: dict[str, Callable[[], Penalty]] = {
    "stationarity": Stationarity,
    "paper": lambda: Stationarity("paper"),
}


def resolve(penalty: str | Penalty) -> Penalty:
    """The penalty behind a name, or the penalty itself.

    Raises:
        ValueError: no penalty has this name.
        TypeError: not a penalty.
    """
    if isinstance(penalty, str):
        if penalty not in _BY_NAME:
            raise ValueError(
                f"penalty must be one of {sorted(_BY_NAME)} or an object such as "
                f"Stationarity(), got {penalty!r}"
            )
        return _BY_NAME[penalty]()
    if isinstance(penalty, type) or not hasattr(penalty, "evaluate"):
        raise TypeError(
            f"penalty must be a name or an object such as Stationarity(), got {penalty!r}"
        )
    return penalty
