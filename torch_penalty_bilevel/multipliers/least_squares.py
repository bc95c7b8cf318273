"""The default rule: the multiplier solves the adjoint equation while v follows g.

Letters: r = grad_v g the residual, nu the multiplier, gamma the penalty weight, lambda the damping,
q = nu + gamma r the adjoint estimate, H = d2g/dv2, a = grad_v f + H q the adjoint residual.
"""

from __future__ import annotations

import copy
import math

from ..dual import DualState, MultiplierRule
from ..evaluation import Evaluation, Norms
from ..tensors import Tensors, axpy, norm, scale, zeros_for
from . import watch


class LeastSquares(MultiplierRule):
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
    fixed share of g's own gradient, whatever the units of f and g. It fades no faster than 1/t:
    once v is at a minimiser of g, r no longer says how far the upper loss has still to carry it
    along the set of minimisers.

    mu = ridge * L + 2 kappa, kappa the most negative curvature <nu, H nu> / ||nu||^2 seen lately,
    as a positive number: along it nu would grow without bound, while H + 2 kappa I is as far above
    zero as H is below. At a minimiser of g there is none and kappa fades.

    The certificate ||a|| is watched: at nu = 0 it is ||grad_v f||. A multiplier far worse than
    that is reported, and one that is hopeless restarts from zero (``BilevelWarning``).

    Differs from Mehra & Hamm (2021), where v descends F_low (curvature gamma H^2, so the square of
    the condition number) and nu advances only when a tolerance test fires. ``benchmarks/smd.py``
    compares the two, ``benchmarks/multipliers.py`` this rule with others.

    Args:
        damping: lambda > 0, multiplies r in the lower direction.
        share: >= 0, how strongly the lower level is pulled towards points that the upper
            loss likes, relative to ||r||. It picks the optimistic solution where argmin_v g is
            not unique; 0 leaves v to g alone. It adds to the curvature that v's rule meets:
            with SGD keep lr * (damping + share) * ||H||_2 below 2, or v diverges.
        ridge: mu / L >= 0. With mu > 0, nu solves (H + mu I) nu = -grad_v f: a biased adjoint that
            does not follow the upper loss into the flat directions of g. Use it where the
            upper loss has few data, as one would regularise any least-squares fit.
    """

    shares_evaluation = True

    # Measured on SMD20-24 (benchmarks/smd.py): forgetting L faster, or probing only at the start,
    # lets it sink below the true curvature on the rank-deficient problems.
    _CURVATURE_MEMORY = 0.999
    _AVERAGE_MEMORY = 0.99
    # Single batches of a non-convex g often show negative curvature that their average has not.
    _INDEFINITE_AVERAGE_MEMORY = 0.9
    _INDEFINITE_MEMORY = 0.99
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
        scalars = {"weight": 0.0, "damping": self.damping, "curvature": 0.0, "pull": 0.0}
        averages = dict.fromkeys(("residual_square", "adjoint_square", "slope_square"), 0.0)
        guard = dict.fromkeys(("signed_curvature", "multiplier_square", "indefinite"), 0.0)
        scalars |= averages | guard | watch.START
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
        scalars = self._observed(state, norms)
        pull = scalars["pull"]
        shift = self.ridge * scalars["curvature"] + 2.0 * scalars["indefinite"]
        step = _ratio(1.0, scalars["curvature"] + shift)
        multiplier = state.multiplier
        if shift > 0:
            multiplier = scale(multiplier, 1.0 - shift * step)
        multiplier = axpy(-step, evaluation.adjoint_residual, multiplier)
        if watch.is_hopeless(scalars, state.steps):
            multiplier, scalars = zeros_for(multiplier), watch.restarted(scalars)
        residual = evaluation.residual
        if self.damping != 1.0:
            residual = scale(residual, self.damping)
        direction = axpy(pull, evaluation.adjoint_residual, residual)
        probe = state.probe
        if evaluation.probe_product:
            probe = scale(evaluation.probe_product, _ratio(1.0, norms.probe_product))
        return direction, DualState(multiplier, probe, scalars, state.steps + 1)

    def _observed(self, state: DualState, norms: Norms) -> dict[str, float]:
        """The scalars after seeing one more evaluation."""
        old = state.scalars

        def average(name: str, value: float, memory: float = self._AVERAGE_MEMORY) -> float:
            return memory * old[name] + (1 - memory) * value

        brief = self._INDEFINITE_AVERAGE_MEMORY
        signed = average("signed_curvature", norms.curvature, brief)
        length = average("multiplier_square", norms.adjoint**2, brief)
        residual = average("residual_square", norms.residual**2)
        adjoint = average("adjoint_square", norms.adjoint_residual**2)
        slope = average("slope_square", norms.slope**2)
        seen = max(_ratio(norms.product, norms.adjoint), norms.probe_product)
        kept = self._CURVATURE_MEMORY * old["curvature"]
        pull = self.share * math.sqrt(_ratio(residual, adjoint + slope))
        return watch.looked_at(
            old
            | {
                "curvature": max(kept, seen, self._least_curvature),
                "pull": max(pull, old["pull"] * state.steps / (state.steps + 1)),
                "residual_square": residual,
                "adjoint_square": adjoint,
                "slope_square": slope,
                "signed_curvature": signed,
                "multiplier_square": length,
                "indefinite": max(
                    self._INDEFINITE_MEMORY * old["indefinite"], _ratio(-signed, length)
                ),
            },
            state.steps,
        )


def _ratio(numerator: float, denominator: float) -> float:
    """Numerator / denominator, and 0 where the denominator is 0."""
    return numerator / denominator if denominator > 0 else 0.0


def _unit(tensors: Tensors) -> Tensors:
    """``tensors`` at length 1; zero stays zero."""
    return scale(tensors, _ratio(1.0, float(norm(tensors))))
