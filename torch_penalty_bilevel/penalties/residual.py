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
    del upper
    full_residual = linearised.residual
    # q or its face may depend on r, which then has to be averaged before.
    early = lower_faces is not everywhere or rule.reads_residual
    if early:
        full_residual = reduce(full_residual)
    face = lower_faces(at.lower, full_residual)
    adjoint = face.tangent(rule.adjoint(state, face.tangent(full_residual)))
    indirect = linearised.product(cast_like(adjoint, at.lower))
    vectors = [filled(indirect.lower, at.lower), filled(direct.lower, at.lower)]
    vectors += [] if early else [full_residual]
    upper_grad = sum_of_optional(direct.upper, indirect.upper)
    del direct, indirect
    (product, slope, *late), upper_grad, losses, used = averaged(
        reduce, at, vectors, upper_grad, (upper_loss, linearised.loss)
    )
    del vectors
    full_residual = late[0] if late else full_residual
    residual = face.tangent(full_residual)
    probe = rule.probe(state, full_residual, slope) if rule.probes(state) else ()
    product = face.tangent(face.curved(product, adjoint))
    slope = face.tangent(slope)
    slope_norms, product_norms = norms(slope), norms(product)
    curvature_terms = _curvature(adjoint, product, multipliers)
    adjoint_residual = add(slope, product)
    del slope
    # With multipliers among q the monotone form is not symmetric.
    spans = not multipliers and rule.spans(state)
    if not spans:
        product = ()
    # All that is let go above is not there while the probe's gradient is taken.
    probe_product: Tensors = ()
    if probe:
        curved = linearised.product(cast_like(probe, at.lower)).lower
        probe_product = face.curved(reduce(filled(curved, at.lower)), probe)
    looks = adjoint, product, adjoint_residual, residual
    return Evaluation(
        upper_loss=losses[0],
        lower_loss=losses[1],
        adjoint=adjoint,
        residual=residual,
        adjoint_residual=adjoint_residual,
        upper_grad=upper_grad,
        slope_norms=slope_norms,
        product_norms=product_norms,
        probe_product=probe_product,
        cost=2 + product_cost * (2 if probe_product else 1),
        lower_face=face,
        curvature_terms=curvature_terms,
        subspace=rule.span(state, *looks) if spans else None,
        upper_used=used,
    )


def _curvature(adjoint: Tensors, product: Tensors, multipliers: int) -> Tensors:
    """Terms of <q, H q>, or with multipliers of the monotone form, in which their sign is minus."""
    terms = LowerPoint.of(dots(adjoint, product), multipliers)
    return terms.parameters + tuple(-t for t in terms.multipliers)
