"""The fixed-point penalty: the lower problem given as an equation v = Phi(u, v)."""

from __future__ import annotations

from ..curvature import Curvature, MapCurvature
from ..evaluation import Evaluation
from ..multipliers import DualState, MultiplierRule
from ..multipliers import resolve as resolve_multiplier
from ..tensors import Pair
from .protocol import Losses, Reduce
from .residual import evaluate_residual


class FixedPoint:
    r"""Penalise the violation of v = Phi(u, v): equilibrium models, and any iteration's limit.

    .. math::
        r = v - \Phi(u, v), \qquad q = \nu + \gamma r, \qquad
        F = f + \langle\nu, r\rangle + \tfrac{\gamma}{2}\lVert r\rVert^2

    .. math::
        \nabla_u F = \nabla_u f - \Phi_u^T q, \qquad
        a = \nabla_v F = \nabla_v f + (I - \Phi_v)^T q

    The lower closure returns Phi(u, v): a tuple with one tensor per lower parameter, in their
    order (a dict by name where they were given with names; a single tensor where there is
    one). One ordinary backward pass of <q, r> gives both products: Phi need not be a gradient, its
    Jacobian Phi_v need not be symmetric, and nothing is differentiated twice. Everything
    else is as in ``Stationarity`` with I - Phi_v in the place of H: if a = 0 the upper
    gradient is the exact hypergradient grad_u f + Phi_u' (I - Phi_v)^{-T} grad_v f.

    The step of ``LeastSquares``, nu <- nu - a / L, has L >= 1 here. The eigenvalues of its
    iteration are 1 - 1/L + mu/L with mu those of Phi_v, so it converges for every map whose
    iteration converges (|mu| < 1), rotating ones included, for which L = ||I - Phi_v|| < 1 alone
    may not do. v follows r itself, so the lower rule must be one for which v <- v - lr r
    converges: any lr <= 1 of SGD without momentum on a contraction.

    ``metrics.lower_loss`` is ||r||^2 / 2, as there is no g. Finite differences cannot form a
    transposed product, so ``curvature="finite_difference"`` is refused.

    Args:
        multiplier: how nu, gamma and lambda move: ``"least_squares"`` (default), ``"paper"``, or
            a configured ``LeastSquares(...)`` or ``EpsilonTest(...)``.

    Example:
        >>> import torch
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> u = torch.tensor([0.0], requires_grad=True)
        >>> v = torch.tensor([0.0], requires_grad=True)
        >>> optimizer = PenaltyBilevelOptimizer(
        ...     [u], [v], upper_lr=0.01, lower_lr=0.05, penalty=FixedPoint()
        ... )
        >>> for _ in range(400):
        ...     loss = optimizer.step(
        ...         lambda: ((v - 1) ** 2).sum(),  # upper loss f
        ...         lambda: 0.5 * v + u            # the map Phi, so v = 2 u
        ...     )
        >>> abs(u.item() - 0.5) < 1e-2 and abs(v.item() - 1.0) < 1e-2
        True
    """

    name = "fixed_point"
    lower_is_map = True
    takes_lower_constraints = False

    def __init__(self, multiplier: str | MultiplierRule = "least_squares") -> None:
        self.rule = resolve_multiplier(multiplier).for_maps()

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        if not isinstance(curvature, MapCurvature):
            raise ValueError(refusal(curvature))
        upper = curvature.gradient(losses.upper, at)
        linearised = curvature.linearise_map(losses.lower, at, reusable=self.rule.probes(state))
        cost = 1 + linearised.again
        return evaluate_residual(self.rule, state, at, upper, linearised, cost, reduce)


def refusal(curvature: Curvature) -> str:
    """Why an engine cannot serve maps."""
    return (
        f'penalty="fixed_point" needs products with a transposed Jacobian, which curvature='
        f'"{curvature.name}" cannot form; use curvature="auto", "double_backward" or '
        '"functional" (no operation is differentiated twice under this penalty)'
    )
