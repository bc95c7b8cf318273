"""The stationarity penalty: the lower problem replaced by grad_v g = 0."""

from __future__ import annotations

from ..arguments import checked_truth
from ..curvature import Curvature
from ..evaluation import Evaluation
from ..multipliers import DualState, MultiplierRule
from ..multipliers import resolve as resolve_multiplier
from ..tensors import Pair, Tensors
from ..workers import Reduce
from .protocol import Losses
from .residual import evaluate_residual


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
        independent_batches: call the lower closure twice per evaluation, r from one call and the
            product from the next. With a closure that draws a batch when called, E[r_A' r_B] =
            ||r||^2, while one batch gives ||r||^2 + tr(Sigma) / B: it removes the bias of
            ``"paper"`` for one more gradient. ``LeastSquares`` has none to remove. Not
            with finite differences, which need the same batch twice.
    """

    name = "stationarity"
    lower_is_map = False
    takes_lower_constraints = True

    def __init__(
        self,
        multiplier: str | MultiplierRule = "least_squares",
        *,
        independent_batches: bool = False,
    ) -> None:
        self.rule = resolve_multiplier(multiplier)
        self.independent_batches = checked_truth("independent_batches", independent_batches)

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        upper = [curvature.gradient(losses.upper, at)]
        other_residual: Tensors | None = None
        if self.independent_batches:
            other_residual = curvature.linearise(losses.lower, at).residual
        linearised = curvature.linearise(losses.lower, at, reusable=self.rule.probes(state))
        if other_residual is not None:
            linearised = linearised._replace(residual=other_residual)
        cost = curvature.product_cost + linearised.again
        evaluation = evaluate_residual(
            self.rule,
            state,
            at,
            upper.pop(),  # it keeps grad_v f no longer than it needs to
            linearised,
            cost,
            reduce,
            losses.lower_faces,
            len(losses.lower_values),
        )
        return evaluation._replace(cost=evaluation.cost + self.independent_batches)
