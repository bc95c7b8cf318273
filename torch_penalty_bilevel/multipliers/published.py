"""The published schedule of multiplier, penalty weight and damping.

Letters: r = grad_v g the residual, nu the multiplier, gamma the penalty weight, lambda the damping,
q = nu + gamma r the adjoint estimate, H = d2g/dv2, a = grad_v f + H q the adjoint residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import Number
from ..evaluation import Evaluation, Norms
from ..tensors import Tensors, axpy, norm
from .protocol import MultiplierRule
from .state import DualState
from .watch import REMEDY, Watch

# A multiplier that moves by a test may never move. By then v has settled, and q with it.
_PATIENCE = 1000
_LITTLE_WORTH = 0.5
_FEW_ADVANCES = 12


@dataclass(frozen=True, eq=False)
class EpsilonTestState(DualState):
    """What ``EpsilonTest`` remembers."""

    tolerance: float = 0.0
    """epsilon."""
    watch: Watch = Watch()


class EpsilonTest(MultiplierRule):
    r"""The published schedule: advance only when both gradients are small (preset ``"paper"``).

    .. math:: \lVert\nabla_u F\rVert^2 + \lVert\nabla_v F_{low}\rVert^2 < \epsilon^2
              \;\Rightarrow\; \nu \mathrel{+}= \gamma r,\;
              \gamma \mathrel{*}= c_\gamma,\; \lambda \mathrel{*}= c,\; \epsilon \mathrel{*}= c

    Source: Mehra & Hamm (ACML 2021) and its reference implementation, whose constants are the
    defaults. Differs from that implementation:

    - it compares the sum of the *fourth* powers of the norms with eps^2; here squares, as written
      above (for eps < 1 its test fires much earlier);
    - it advances nu with the already grown gamma; here with the gamma that produced r;
    - it evaluates the test afresh after the upper step; here with the gradients the upper step
      used, which saves one evaluation per step;
    - it also decays both learning rates on an advance; use a ``torch.optim.lr_scheduler``;
    - nu starts at zero (there: at zero or at a small constant, by experiment).

    r and its product share a minibatch, so E||r_B||^2 = ||r||^2 + tr(Sigma)/B biases the upper
    gradient when the closures draw batches; with full batches there is no bias.

    A certificate ||a|| that after 1,000 lower steps is still above half of what q = 0 has is
    reported (``BilevelWarning``): gamma is too small for this problem, or the test never fires.

    Args:
        weight: initial gamma, multiplies ||r||^2 / 2; > 0.
        damping: initial lambda, multiplies g in the lower level only; >= 0.
        tolerance: initial epsilon, a bound on the joint gradient norm (not squared); > 0.
        growth: factor on gamma at an advance; >= 1.
        decay: factor on lambda and epsilon at an advance; in (0, 1].
    """

    shares_evaluation = False

    weight = Number("be a finite number > 0", "without it nothing penalises r")
    damping = Number("be a finite number >= 0", "0 leaves g out of the lower direction")
    tolerance = Number("be a finite number > 0", "at 0 the multiplier never moves")
    growth = Number("be a finite number >= 1", "the weight may not shrink; 1 leaves it alone")
    decay = Number("lie in (0, 1]", "1 leaves damping and tolerance alone")

    def __init__(
        self,
        weight: float = 1e-2,
        damping: float = 1e-2,
        tolerance: float = 1e-2,
        growth: float = 1.1,
        decay: float = 0.9,
    ) -> None:
        self.weight = weight
        self.damping = damping
        self.tolerance = tolerance
        self.growth = growth
        self.decay = decay

    def start(self, lower: Tensors) -> EpsilonTestState:
        return EpsilonTestState.at(
            lower, weight=self.weight, damping=self.damping, tolerance=self.tolerance
        )

    def adjoint(self, state: EpsilonTestState, residual: Tensors) -> Tensors:
        return axpy(state.weight, residual, state.multiplier)

    def lower_update(
        self, state: EpsilonTestState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, EpsilonTestState]:
        seen = state.watch.seen(norms, state.steps)
        watch = seen.looked_at(norms, state.steps, _LITTLE_WORTH, _PATIENCE, self._remedy(state))
        direction = self._lower_direction(state, evaluation)
        return direction, state.but(watch=watch, steps=state.steps + 1)

    def upper_update(
        self, state: EpsilonTestState, evaluation: Evaluation, norms: Norms
    ) -> EpsilonTestState:
        lower_grad = float(norm(self._lower_direction(state, evaluation)))
        if not math.hypot(norms.upper_grad, lower_grad) < state.tolerance:
            return state
        return state.but(
            multiplier=axpy(state.weight, evaluation.residual, state.multiplier),
            weight=state.weight * self.growth,
            damping=state.damping * self.decay,
            tolerance=state.tolerance * self.decay,
        )

    def _remedy(self, state: EpsilonTestState) -> str:
        if state.weight >= self.growth**_FEW_ADVANCES * self.weight:
            return REMEDY
        return (
            f"The weight is {state.weight:.2g} and began at {self.weight:.2g}: it and the "
            "multiplier move only where both gradients are below the tolerance; raise "
            "EpsilonTest(tolerance=...), or begin with a larger weight"
        )

    @staticmethod
    def _lower_direction(state: EpsilonTestState, evaluation: Evaluation) -> Tensors:
        """grad_v F_low = a + lambda r."""
        return axpy(state.damping, evaluation.residual, evaluation.adjoint_residual)
