"""The default rule: the multiplier solves the adjoint equation while v follows g.

Letters: r = grad_v g the residual, nu the multiplier, gamma the penalty weight, lambda the damping,
q = nu + gamma r the adjoint estimate, H = d2g/dv2, a = grad_v f + H q the adjoint residual.
"""

from __future__ import annotations

import copy
import math

from ..arguments import Fixed, Number
from ..evaluation import Evaluation, Norms, Subspace
from ..tensors import Tensors, axpy, norm, scale, zeros_for
from . import lower_correction
from .averages import average, ratio
from .correction import check_asked, corrected
from .least_squares_state import FollowedState, LeastSquaresState, SubspaceState
from .preconditioning import Preconditioner, Units, resting
from .protocol import Jump, MultiplierRule

_LARGEST_SUBSPACE = 10**7  # numbers in v up to which the correction is made where nobody says


class LeastSquares(MultiplierRule):
    r"""A multiplier that solves the adjoint equation by descent, while v follows g (the default).

    .. math::
        a = \nabla_v f + H\nu, \qquad
        v \leftarrow \text{rule}(\lambda r + w a), \qquad
        \nu \leftarrow \nu - \frac{a + \mu\nu}{L + \mu}

    r = 0 and a = 0 at the end for any lambda > 0 and w >= 0 (with ridge 0): nothing has to grow or
    vanish, and nu is then exactly -H^{-1} grad_v f. There is no ||r||^2 term (gamma = 0): nu does
    not depend on the batch at hand, so the upper gradient is unbiased under minibatches.

    To this step comes a correction in the span of the latest three multipliers, whose products
    with H are known: between conjugate gradients and minimal residuals where v stands still,
    nothing where batches make it worthless, as its own forecasts tell
    (``multipliers/subspace.py``, ``multipliers/forecast.py``).

    L bounds ||H||_2: the running maximum of ||H q|| / ||q|| and of a power iteration that costs one
    more product in the first 10 lower steps, in every 20th after, and in every step in which its
    last product was under a tenth of L. The ratio alone will not do: nu lives where H is flat, so
    it sees too little curvature and the stiffest direction of nu then grows. While the probes see
    so much less, L is forgotten ten times faster, and while they see no curvature at all (g flat
    for a while, every ReLU dead) L is held and nu waits.

    w = share * L * D / S, where D holds the length rms(r) / L, about the way of v to the lower
    solution, and S the slope rms(grad_v f): the pull is a fixed share of g's own gradient, whatever
    the units of f and g. Both are maxima that fade no faster than 1/t (S: 1/(t + 100), so that it
    never fades before D), from averages over about 100 steps.
    D: once v is at a minimiser of g, r no longer says how far f has still to carry it along the set
    of minimisers. S: where both vanish, at a solution that f likes best, their ratio says nothing,
    and w would grow until it throws v out. The present ||a|| and ||grad_v f|| count in S at once,
    so that a loss that was zero for a while meets a w made for it. A length and not rms(r), so that
    w follows when g changes its scale. Where f is scaled down for good, S is too large for long:
    then only the pull is weak. (Both fading geometrically forgets that, but loses the way along a
    set of minimisers in long runs: error 2e-6 for 1e-8. Holding ||a|| in S as well stalls there, at
    2e-1, after g * 1e6.)

    mu = ridge * L + 2 kappa, kappa the most negative curvature <nu, H nu> / ||nu||^2 seen lately,
    as a positive number: along it nu would grow without bound, while H + 2 kappa I is as far above
    zero as H is below. At a minimiser of g there is none and kappa fades.

    The certificate ||a|| is watched: at nu = 0 it is ||grad_v f||. A multiplier far worse than
    that is reported, and one that is hopeless restarts from zero (``BilevelWarning``).

    Differs from Mehra & Hamm (2021), where v descends F_low (curvature gamma H^2, so the square of
    the condition number) and nu advances only when a tolerance test fires. ``benchmarks/smd.py``
    compares the two, ``benchmarks/multipliers`` this rule with others.

    Args:
        damping: lambda > 0, multiplies r in the lower direction.
        share: >= 0, how strongly the lower level is pulled towards points that the upper
            loss likes, relative to ||r||. It picks the optimistic solution where argmin_v g is
            not unique; 0 leaves v to g alone. Along flat directions of g it trains v on the upper
            loss: of a network whose hyperparameters are u take 0.1 or 0 (``benchmarks/pull.py``).
            It adds to the curvature that v's rule meets: with SGD keep
            lr * (damping + share) * ||H||_2 below 2, or v diverges.
        ridge: mu / L >= 0. With mu > 0, nu solves (H + mu I) nu = -grad_v f: a biased adjoint that
            does not follow the upper loss into the flat directions of g. Use it where the
            upper loss has few data, as one would regularise any least-squares fit.
        subspace: is the correction made? It keeps four vectors like v and costs a tenth to a half
            of a step where a gradient is cheap, nothing where it rests; None: where v has at most
            10 million numbers. Never for maps and under lower inequalities.
        correct_lower: does v, too, move towards the minimiser of g's quadratic model in that span,
            before the lower rule goes on from there (``multipliers/lower_correction.py``)? No
            further product, two vectors. Where g is ill-conditioned and sees no batches v follows u
            many times faster; under noise it turns itself off. Step hooks do not see it, schedules
            of the lower rate shorten it, a rate of 0 holds v. g is a loss, without inequalities.
        preconditioner: ``(vectors, power) -> tensors``, P^power times a tuple shaped like those
            lower parameters that move, for powers 1/2 and -1/2, P symmetric positive definite and
            as much like H as can be had: a diagonal, Kronecker factors. The multiplier then moves
            by -P^-1 a / L, L >= ||P^-1/2 H P^-1/2||, six times the call per lower step; where it
            ends and what the certificate says do not depend on P
            (``multipliers/preconditioning.py``). None: P = I. Never for maps, with a ridge or under
            lower inequalities.
    """

    shares_evaluation, reads_residual = True, False

    damping = Number("be a finite number > 0", "it makes v follow g")
    share = Number("be a finite number >= 0", "0 switches the pull off")
    ridge = Number("be a finite number >= 0", "0 gives the exact adjoint")
    subspace, correct_lower, preconditioner = Fixed(), Fixed(), Fixed()

    # Measured on SMD20-24 (benchmarks/smd.py): forgetting L faster, or probing only at the start,
    # lets it sink below the true curvature on the rank-deficient problems.
    _CURVATURE_MEMORY = 0.999
    _UNBACKED_MEMORY = 0.99
    _AVERAGE_MEMORY = 0.99
    # Single batches of a non-convex g often show negative curvature that their average has not.
    _INDEFINITE_AVERAGE_MEMORY = 0.9
    _INDEFINITE_MEMORY = 0.99
    _FIRST_PROBES = 10
    _PROBE_EVERY = 20
    _least_curvature = 0.0

    def __init__(
        self,
        damping: float = 1.0,
        share: float = 0.3,
        ridge: float = 0.0,
        subspace: bool | None = None,
        correct_lower: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.damping, self.share, self.ridge = damping, share, ridge
        check_asked(correct_lower, subspace, preconditioner is not None)
        self.subspace = True if correct_lower else subspace
        self.correct_lower, self.preconditioner = correct_lower, preconditioner
        Units.of(preconditioner, self.ridge)

    @property
    def _units(self) -> Units | None:
        return Units.of(self.preconditioner, self.ridge)  # the ridge may have changed

    def for_maps(self) -> LeastSquares:
        """With L >= 1, and no correction, whose forecasts need a symmetric H."""
        if self.correct_lower or self._units is not None:
            raise ValueError(
                "correct_lower and preconditioner need the symmetric H of a lower loss; leave them "
                "away where the lower closure returns a map, which may take such steps itself"
            )
        rule = copy.copy(self)
        vars(rule).update(_least_curvature=1.0, subspace=False)
        return rule

    def start(self, lower: Tensors) -> LeastSquaresState:
        small = sum(t.numel() for t in lower) <= _LARGEST_SUBSPACE
        corrects = small if self.subspace is None else self.subspace
        kind = SubspaceState if corrects else LeastSquaresState
        kind = FollowedState if self.correct_lower else kind
        return kind.at(lower, damping=self.damping)

    def curvature_bound(self, state: LeastSquaresState) -> float | None:
        return state.curvature if self._units is None else None  # else of H in other units

    def correction_gain(self, state: LeastSquaresState) -> float:
        return state.forecast.gain if isinstance(state, SubspaceState) else math.nan

    def shift(self, state: LeastSquaresState) -> float:
        return self.ridge * state.curvature

    def adjoint(self, state: LeastSquaresState, residual: Tensors) -> Tensors:
        return state.multiplier

    def probes(self, state: LeastSquaresState) -> bool:
        due = state.steps < self._FIRST_PROBES or state.steps % self._PROBE_EVERY == 0
        return due or not state.is_backed()

    def probe(self, state: LeastSquaresState, residual: Tensors, slope: Tensors) -> Tensors:
        if (units := self._units) is not None:
            driving = units.driving(residual), units.driving(slope)
            return units.direction(self._probe(state, *driving))
        return self._probe(state, residual, slope)

    def _probe(self, state: LeastSquaresState, residual: Tensors, slope: Tensors) -> Tensors:
        # nu is excited by grad_v f and v by r, so their directions are where curvature matters.
        if state.probed > 0:
            return state.probe
        first = _unit(residual)
        both = axpy(1.0, first, _unit(slope))
        # Opposite directions cancel (always possible with one lower entry): then one will do.
        fresh = _unit(both) if float(norm(both)) > 1e-3 else first
        # What was stiff before g went flat is likely to be so when it comes back.
        return _unit(axpy(1.0, fresh, state.probe))

    def spans(self, state: LeastSquaresState) -> bool:
        due = isinstance(state, SubspaceState) and state.forecast.is_due(state.steps)
        is_own = type(self).span is not LeastSquares.span  # of a subclass: nothing is known of it
        return due or is_own or self._units is not None

    def span(
        self,
        state: LeastSquaresState,
        adjoint: Tensors,
        product: Tensors,
        adjoint_residual: Tensors,
        residual: Tensors,
    ) -> Subspace | None:
        vectors = adjoint, product, adjoint_residual
        if self._units is not None:
            vectors = self._units.vectors(*vectors)
        if not isinstance(state, SubspaceState) or not state.forecast.is_due(state.steps):
            return None if self._units is None else resting(vectors)
        rest = (residual, state.lower_move) if isinstance(state, FollowedState) else ()
        return state.before().span(*vectors, *rest)

    def jump(self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms) -> Jump | None:
        if not isinstance(state, FollowedState):
            return None
        how = self._whole_shift(state), state.curvature
        return lower_correction.jump(state.trust, evaluation, norms, *how)

    def follows_lower(self, state: LeastSquaresState) -> bool:
        return isinstance(state, FollowedState)

    def followed(self, state: LeastSquaresState, move: Tensors) -> LeastSquaresState:
        return state.but(lower_move=move)

    def followed_further(self, state: FollowedState, move: Tensors) -> FollowedState:
        return state.but(lower_move=axpy(1.0, state.lower_move, move))

    def plain_direction(self, state: LeastSquaresState, residual: Tensors) -> Tensors:
        return residual if self.damping == 1.0 else scale(residual, self.damping)

    def lower_update(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, LeastSquaresState]:
        units = self._units
        if units is None:
            after = self._moved(state, evaluation, norms)
        else:
            after = units.outside(self._moved(*units.inside(state, evaluation, norms)))
        residual = self.plain_direction(state, evaluation.residual)
        return axpy(after.pull, evaluation.adjoint_residual, residual), after

    def _moved(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> LeastSquaresState:
        """The state after this lower step."""
        seen = self._observed(state, evaluation, norms)
        multiplier, watch = state.multiplier, seen.watch
        if seen.probed > 0 or norms.product > 0:  # else H = 0 for all that is known
            multiplier = self._descended(seen, evaluation.adjoint_residual)
        if isinstance(seen, SubspaceState):
            how = norms, self._whole_shift(seen), self._reach(norms)
            multiplier, seen = corrected(multiplier, seen, evaluation.subspace, *how)
        if watch.is_hopeless(state.steps):
            multiplier, watch = zeros_for(multiplier), watch.restarted(norms)
        probe = state.probe
        if norms.probe_product > 0:
            probe = scale(evaluation.probe_product, 1.0 / norms.probe_product)
        return seen.but(multiplier=multiplier, probe=probe, watch=watch, steps=state.steps + 1)

    def _descended(self, state: LeastSquaresState, adjoint_residual: Tensors) -> Tensors:
        """Nu - (a + mu nu) / (L + mu)."""
        multiplier, shift = state.multiplier, self._whole_shift(state)
        step = ratio(1.0, state.curvature + shift)
        if shift > 0:
            multiplier = scale(multiplier, 1.0 - shift * step)
        return axpy(-step, adjoint_residual, multiplier)

    def _reach(self, norms: Norms) -> float:
        """Rho of the correction."""
        return 0.75 * max(0.0, 1.0 - ratio(norms.adjoint_residual, norms.slope))

    def _whole_shift(self, state: LeastSquaresState) -> float:
        """Mu."""
        return self.shift(state) + 2.0 * state.indefinite

    def _observed(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> LeastSquaresState:
        """The numbers after seeing one more evaluation."""
        watch = state.watch.seen(norms, state.steps)
        probed = norms.probe_product if evaluation.probe_product else state.probed
        curvature = self._bound(state, norms, probed)
        residual_square = average(state.residual_square, norms.residual**2, self._AVERAGE_MEMORY)
        faded = state.length * state.steps / (state.steps + 1)
        length = max(ratio(math.sqrt(residual_square), curvature), faded)
        brief = self._INDEFINITE_AVERAGE_MEMORY
        signed = average(state.signed_curvature, norms.curvature, brief)
        square = average(state.multiplier_square, norms.adjoint**2, brief)
        return state.but(
            pull=self.share * curvature * ratio(length, watch.steepest(norms)),
            curvature=curvature,
            probed=probed,
            residual_square=residual_square,
            length=length,
            signed_curvature=signed,
            multiplier_square=square,
            indefinite=max(self._INDEFINITE_MEMORY * state.indefinite, ratio(-signed, square)),
            watch=watch.looked_at(norms, state.steps),
        )

    def _bound(self, state: LeastSquaresState, norms: Norms, probed: float) -> float:
        """L."""
        seen = max(ratio(norms.product, norms.adjoint), norms.probe_product)
        memory = self._CURVATURE_MEMORY
        if not state.is_backed():
            memory = self._UNBACKED_MEMORY if probed > 0 else 1.0
        return max(memory * state.curvature, seen, self._least_curvature)


def _unit(tensors: Tensors) -> Tensors:
    """``tensors`` at length 1; zero stays zero."""
    return scale(tensors, ratio(1.0, float(norm(tensors))))
