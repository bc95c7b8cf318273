"""What the penalties with a residual r(u, v) = 0 and a multiplier have in common."""

from __future__ import annotations

from torch import Tensor

from ..constraints import FacesOf, LowerPoint, everywhere
from ..curvature import Linearised
from ..evaluation import Evaluation
from ..multipliers import DualState, MultiplierRule
from ..tensors import (
    OptionalPair,
    Pair,
    Tensors,
    add,
    cast_like,
    dots,
    filled,
    norms,
    sum_of_optional,
)
from ..workers import Reduce, averaged


def evaluate_residual(
    rule: MultiplierRule,
    state: DualState,
    at: Pair,
    upper: tuple[Tensor, OptionalPair],
    linearised: Linearised,
    product_cost: int,
    reduce: Reduce,
    lower_faces: FacesOf = everywhere,
    multipliers: int = 0,
) -> Evaluation:
    """The adjoint q = nu + gamma r, a = grad_v f + (dr/dv)'q and grad_u f + (dr/du)'q.

    Args:
        rule: says what q is and whether it wants a probe.
        state: of the rule.
        at: (u, v).
        upper: f and its gradient.
        linearised: r and the product q -> ((dr/du)'q, (dr/dv)'q).
        product_cost: gradient evaluations per product.
        reduce: averages over workers.
        lower_faces: of the set that v stays in; r, q and a lie in the span of the critical face.
        multipliers: how many of the last tensors of v are multipliers, along which q ascends.
    """
    upper_loss, direct = upper
    full_residual = linearised.residual
    # q or its face may depend on r, which then has to be averaged before.
    early = lower_faces is not everywhere or rule.reads_residual
    if early:
        full_residual = reduce(full_residual)
    face = lower_faces(at.lower, full_residual)
    adjoint = face.tangent(rule.adjoint(state, face.tangent(full_residual)))
    indirect = linearised.product(cast_like(adjoint, at.lower))
    parts = filled(indirect.lower, at.lower), filled(direct.lower, at.lower)
    upper_grad = sum_of_optional(direct.upper, indirect.upper)
    vectors = parts if early else (*parts, full_residual)
    found = averaged(reduce, at, vectors, upper_grad, (upper_loss, linearised.loss))
    product, slope, *late = found.lower
    full_residual = late[0] if late else full_residual
    residual = face.tangent(full_residual)
    probe_product: Tensors = ()
    if rule.probes(state):
        probe = rule.probe(state, full_residual, slope)
        curved = linearised.product(cast_like(probe, at.lower)).lower
        probe_product = face.curved(reduce(filled(curved, at.lower)), probe)
    product = face.tangent(face.curved(product, adjoint))
    slope = face.tangent(slope)
    adjoint_residual = add(slope, product)
    looks = adjoint, product, adjoint_residual, residual
    return Evaluation(
        upper_loss=found.losses[0],
        lower_loss=found.losses[1],
        adjoint=adjoint,
        residual=residual,
        adjoint_residual=adjoint_residual,
        upper_grad=found.upper,
        slope_norms=norms(slope),
        product_norms=norms(product),
        probe_product=probe_product,
        cost=2 + product_cost * (2 if probe_product else 1),
        lower_face=face,
        curvature_terms=_curvature(adjoint, product, multipliers),
        # With multipliers among q the monotone form is not symmetric.
        subspace=None if multipliers else rule.span(state, *looks),
        upper_used=found.used,
    )


def _curvature(adjoint: Tensors, product: Tensors, multipliers: int) -> Tensors:
    """Terms of <q, H q>, or with multipliers of the monotone form, in which their sign is minus."""
    terms = LowerPoint.of(dots(adjoint, product), multipliers)
    return terms.parameters + tuple(-t for t in terms.multipliers)
