"""How the multiplier, the penalty weight and the damping move: two rules behind one protocol.

Letters: r = grad_v g the residual, nu the multiplier, gamma the penalty weight, lambda the damping,
q = nu + gamma r the adjoint estimate, H = d2g/dv2, a = grad_v f + H q the adjoint residual.
A rule is a set of constants; what changes lives in a ``DualState`` that goes in and comes out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from .choices import chosen
from .dual import DualState, MultiplierRule
from .evaluation import Evaluation, Norms
from .tensors import Tensors, axpy, norm, scale, zeros_for


class LeastSquares:
    r"""A multiplier that solves the adjoint equation by descent, while v follows g (the default).

    .. math::
        a = \nabla_v f + H\nu, \qquad
        v \leftarrow \text{rule}(\lambda r + w a), \qquad
        \nu \leftarrow \nu - \frac{a + \mu\nu}{L + \mu}

    r = 0 and a = 0 at the end for any lambda > 0 and w >= 0 (with ridge 0): nothing has to grow or
    vanish, and nu is then exactly -H^{-1} grad_v f. There is no ||r||^2 term (gamma = 0): nu does
    not depend on the batch at hand, so the upper gradient is unbiased under minibatches.

    L bounds ||H||_2: the running maximum of ||H q|| / ||q|| and of a power iteration that costs one
    more product in the first 10 lower steps and in every 20th after. The ratio alone will
    not do: nu lives where H is flat, so it sees too little curvature and the stiffest direction
    of nu then grows.

    w = share * rms(r) / rms(a, grad_v f), running averages over about 100 steps: the pull is a
    fixed share of g's own gradient, whatever the units of f and g.

    Differs from Mehra & Hamm (2021), where v descends F_low (curvature gamma H^2, so the square of
    the condition number) and nu advances only when a tolerance test fires. ``benchmarks/smd.py``
    compares the two.

    Args:
        damping: lambda > 0, multiplies r in the lower direction.
        share: >= 0, how strongly the lower level is pulled towards points that the upper
            loss likes, relative to ||r||. It picks the optimistic solution where argmin_v g is
            not unique; 0 leaves v to g alone.
        ridge: mu / L >= 0. With mu > 0, nu solves (H + mu I) nu = -grad_v f: a biased adjoint that
            does not follow the upper loss into the flat directions of g. Use it where the
            upper loss has few data, as one would regularise any least-squares fit.
    """

    shares_evaluation = True

    # Measured on SMD20-24 (benchmarks/smd.py): forgetting L faster, or probing only at the start,
    # lets it sink below the true curvature on the rank-deficient problems.
    _CURVATURE_MEMORY = 0.999
    _AVERAGE_MEMORY = 0.99
    _FIRST_PROBES = 10
    _PROBE_EVERY = 20
    _least_curvature = 0.0

    def __init__(self, damping: float = 1.0, share: float = 0.3, ridge: float = 0.0) -> None:
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be > 0, got {damping}; it makes v follow g")
        if not 0 <= share < math.inf:
            raise ValueError(f"share must be >= 0, got {share}; 0 switches the pull off")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"ridge must be >= 0, got {ridge}; 0 gives the exact adjoint")
        self.damping = damping
        self.share = share
        self.ridge = ridge

    def bounded_below(self, curvature: float) -> LeastSquares:
        """The same rule with L >= ``curvature``, whatever is seen."""
        rule = copy.copy(self)
        rule._least_curvature = curvature
        return rule

    def start(self, lower: Tensors) -> DualState:
        averages = {"residual_square": 0.0, "adjoint_square": 0.0, "slope_square": 0.0}
        scalars = {"weight": 0.0, "damping": self.damping, "curvature": 0.0} | averages
        return DualState(zeros_for(lower), zeros_for(lower), scalars, 0)

    def adjoint(self, state: DualState, residual: Tensors) -> Tensors:
        return state.multiplier

    def probes(self, state: DualState) -> bool:
        return state.steps < self._FIRST_PROBES or state.steps % self._PROBE_EVERY == 0

    def probe(self, state: DualState, residual: Tensors, slope: Tensors) -> Tensors:
        # nu is excited by grad_v f and v by r, so their directions are where curvature matters.
        if state.scalars["curvature"] > 0:
            return state.probe
        first = _unit(residual)
        both = axpy(1.0, first, _unit(slope))
        # Opposite directions cancel (always possible with one lower entry): then one will do.
        return _unit(both) if float(norm(both)) > 1e-3 else first

    def lower_update(
        self, state: DualState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, DualState]:
        scalars = self._averaged(state.scalars, norms)
        spread = scalars["adjoint_square"] + scalars["slope_square"]
        pull = self.share * math.sqrt(_ratio(scalars["residual_square"], spread))
        direction = axpy(
            pull, evaluation.adjoint_residual, scale(evaluation.residual, self.damping)
        )
        # (a + mu nu) / (L + mu) with mu = ridge * L.
        step = _ratio(1.0, scalars["curvature"] * (1.0 + self.ridge))
        fade = 1.0 - self.ridge / (1.0 + self.ridge)
        multiplier = axpy(-step, evaluation.adjoint_residual, scale(state.multiplier, fade))
        probe = state.probe
        if evaluation.probe_product:
            probe = scale(evaluation.probe_product, _ratio(1.0, norms.probe_product))
        return direction, DualState(multiplier, probe, scalars, state.steps + 1)

    def _averaged(self, old: dict[str, float], norms: Norms) -> dict[str, float]:
        def average(name: str, length: float) -> float:
            return self._AVERAGE_MEMORY * old[name] + (1 - self._AVERAGE_MEMORY) * length**2

        seen = max(_ratio(norms.product, norms.adjoint), norms.probe_product)
        return old | {
            "curvature": max(
                self._CURVATURE_MEMORY * old["curvature"], seen, self._least_curvature
            ),
            "residual_square": average("residual_square", norms.residual),
            "adjoint_square": average("adjoint_square", norms.adjoint_residual),
            "slope_square": average("slope_square", norms.slope),
        }

    def upper_update(self, state: DualState, evaluation: Evaluation, norms: Norms) -> DualState:
        return state


class EpsilonTest:
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

    Args:
        weight: initial gamma, multiplies ||r||^2 / 2; > 0.
        damping: initial lambda, multiplies g in the lower level only; >= 0.
        tolerance: initial epsilon, a bound on the joint gradient norm (not squared); > 0.
        growth: factor on gamma at an advance; >= 1.
        decay: factor on lambda and epsilon at an advance; in (0, 1].
    """

    shares_evaluation = False

    def __init__(
        self,
        weight: float = 1e-2,
        damping: float = 1e-2,
        tolerance: float = 1e-2,
        growth: float = 1.1,
        decay: float = 0.9,
    ) -> None:
        if not weight > 0:
            raise ValueError(f"weight must be > 0, got {weight}; without it nothing penalises r")
        if not damping >= 0:
            raise ValueError(f"damping must be >= 0, got {damping}")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {tolerance}; the multiplier never moves")
        if not growth >= 1:
            raise ValueError(f"growth must be >= 1, got {growth}; the weight may not shrink")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        self.weight = weight
        self.damping = damping
        self.tolerance = tolerance
        self.growth = growth
        self.decay = decay

    def start(self, lower: Tensors) -> DualState:
        scalars = {"weight": self.weight, "damping": self.damping, "tolerance": self.tolerance}
        return DualState(zeros_for(lower), (), scalars, 0)

    def adjoint(self, state: DualState, residual: Tensors) -> Tensors:
        return axpy(state.scalars["weight"], residual, state.multiplier)

    def probes(self, state: DualState) -> bool:
        return False

    def probe(self, state: DualState, residual: Tensors, slope: Tensors) -> Tensors:
        raise AssertionError("this rule asks for no probe")

    def lower_update(
        self, state: DualState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, DualState]:
        return self._lower_direction(state, evaluation), state._replace(steps=state.steps + 1)

    def upper_update(self, state: DualState, evaluation: Evaluation, norms: Norms) -> DualState:
        lower_grad = float(norm(self._lower_direction(state, evaluation)))
        if not math.hypot(norms.upper_grad, lower_grad) < state.scalars["tolerance"]:
            return state
        old = state.scalars
        return state._replace(
            multiplier=axpy(old["weight"], evaluation.residual, state.multiplier),
            scalars={
                "weight": old["weight"] * self.growth,
                "damping": old["damping"] * self.decay,
                "tolerance": old["tolerance"] * self.decay,
            },
        )

    @staticmethod
    def _lower_direction(state: DualState, evaluation: Evaluation) -> Tensors:
        """grad_v F_low = a + lambda r."""
        return axpy(state.scalars["damping"], evaluation.residual, evaluation.adjoint_residual)


def _ratio(numerator: float, denominator: float) -> float:
    """Numerator / denominator, and 0 where the denominator is 0."""
    return numerator / denominator if denominator > 0 else 0.0


def _unit(tensors: Tensors) -> Tensors:
    """``tensors`` at length 1; zero stays zero."""
    return scale(tensors, _ratio(1.0, float(norm(tensors))))


_BY_NAME: dict[str, Callable[[], MultiplierRule]] = {
    "least_squares": LeastSquares,
    "paper": EpsilonTest,
}


def resolve(multiplier: str | MultiplierRule) -> MultiplierRule:
    """The rule behind a name, or the rule itself.

    Raises:
        ValueError: no rule has this name.
        TypeError: not a rule.
    """
    return chosen("multiplier", multiplier, _BY_NAME, "lower_update", "LeastSquares()")
