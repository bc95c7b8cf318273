"""The stationarity penalty: the lower problem replaced by grad_v g = 0."""

from __future__ import annotations

from ..curvature import Curvature
from ..dual import DualState, MultiplierRule
from ..evaluation import Evaluation
from ..multipliers import resolve as resolve_multiplier
from ..tensors import Pair
from .protocol import Losses, Reduce
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

    The residual is reduced over workers *before* the product: q is not linear in the data
    when gamma > 0, so averaging each worker's product instead would penalise each worker's own
    ||r||^2, a different function.

    Args:
        multiplier: how nu, gamma and lambda move: ``"least_squares"`` (default), ``"paper"``, or
            a configured ``LeastSquares(...)`` or ``EpsilonTest(...)``.
    """

    name = "stationarity"
    lower_is_map = False

    def __init__(self, multiplier: str | MultiplierRule = "least_squares") -> None:
        self.rule = resolve_multiplier(multiplier)

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        upper = curvature.gradient(losses.upper, at)
        linearised = curvature.linearise(losses.lower, at, reusable=self.rule.probes(state))
        cost = curvature.product_cost
        return evaluate_residual(self.rule, state, at, upper, linearised, cost, reduce)
