"""The value-gap penalty: the lower problem replaced by g(u, v) <= min g(u, .)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Number, checked_truth
from ..curvature import Curvature, Loss
from ..evaluation import Evaluation, Norms
from ..multipliers import MEMORY, POINT, DualState, Move, MultiplierRule, Watch, along
from ..multipliers.averages import average, ratio
from ..tensors import (
    OptionalPair,
    OptionalTensors,
    Pair,
    Tensors,
    add,
    axpy,
    clones,
    coarsest_eps,
    filled,
    norms,
    scale,
    sum_of_present,
)
from ..undo.in_place import replaced
from ..undo.random_state import RandomState
from ..undo.repeats import check_gradient_repeats
from ..undo.rule_memory import Moments
from ..workers import Reduce, averaged
from .protocol import Losses

_NEEDS_REPETITION = (
    "The value gap needs the same data twice: draw the batch outside the closure, or use "
    'penalty="stationarity"'
)


@dataclass(frozen=True, eq=False)
class ValueGapState(DualState):
    """What ``ValueGap`` remembers; its ``multiplier`` is the last q."""

    tracker: Tensors = along(POINT)
    """z, a second lower point that follows argmin g(u, .)."""
    moments: tuple[Moments, ...] = along(MEMORY)
    """What the lower rule remembers about each tensor of z."""
    residual_square: float = 0.0
    """Mean square of ||grad_v g||."""
    curvature: float = 0.0
    """L."""
    length: float = 0.0
    """D."""
    slope_scale: float = 0.0
    """S."""
    watch: Watch = Watch()


class ValueGap(MultiplierRule):
    r"""Penalise the gap between g(u, v) and the least value of g (BOME, F2SA, V-PBGD).

    .. math::
        F = f + \gamma\,(g(u, v) - g(u, z)), \qquad z \approx \arg\min g(u, \cdot)

    .. math::
        u \leftarrow \text{upper rule}(\nabla_u f + \gamma(\nabla_u g(u,v) - \nabla_u g(u,z)))

    .. math::
        v \leftarrow \text{lower rule}(\nabla_v g(u,v) + \nabla_v f / \gamma), \qquad
        z \leftarrow \text{lower rule}(\nabla_v g(u,z))

    Three gradients per evaluation and no second-order product; the price is a second copy of v
    with its own moments, and a bias O(1/gamma): with H = d2g/dv2,

    .. math::
        q = \gamma (v - z) \to -H^{-1}\nabla_v f + O(1/\gamma), \qquad
        a = \nabla_v f + \gamma(\nabla_v g(u,v) - \nabla_v g(u,z)) \approx \nabla_v f + H q

    q is reported as ``adjoint`` and ||a|| as ``adjoint_residual_norm``; at the solution a = 0 and
    the upper gradient is still biased: a certifies that v has settled, not that gamma is large.
    Where H is singular (g = (v - u)^4 / 4) the error is O(gamma^{-1/3}), against gamma^{-1/5} of
    a penalty on the gradient. Maxima and saddles of g are not feasible, as they are where
    grad_v g = 0 is all that is asked.

    z starts at v and moves by the lower rule, with the rule's learning rates and hooks and with
    moments of its own: then a lag behind the moving argmin is common to v and z and cancels in
    v - z. (Gradient steps 1 / L for z beside Adam for v: 0.49 of noisy digits told right after 600
    steps, which is chance, against 0.90.) Where g is flatter than quadratic Adam stops z short of
    the argmin; use SGD for the lower rule there.

    Both points see the same batch, random numbers and buffers; the closure is called twice per
    evaluation. v's gradient is F's over gamma, so learning rates mean what they mean in training
    on g.

    Differs from the papers: one loop, z and v moved together by any torch rule; gamma in units
    of the two gradients. A certificate far worse than that of q = 0 is reported.

    gamma = weight * S / (L D), where S holds the slope ||grad_v f||, D the length ||grad_v g|| / L
    and L the curvature ||grad g(v) - grad g(z)|| / ||v - z||, known for nothing: at the start f
    enters v's step with 1 / weight of the size of grad_v g, whatever the units of f and g. S and D
    are maxima that fade no faster than 1 / sqrt(t), and D is at least a tenth of
    ||z|| / sqrt(1 + t / 1000). Where v settles, ||grad_v g|| = ||grad_v f|| / gamma, so a gamma
    that followed it would feed itself, and where both vanish their ratio would say nothing. So
    gamma grows about like sqrt(t), from any start, also at the minimiser of g; a state that is
    solved keeps its gamma, and an f that was zero for a while finds the gamma it had. v - z stays
    above sqrt(eps) ||z|| / weight, or it would drown in rounding. Where f or g is scaled down by
    many orders in mid run, gamma comes back slowly; begin anew there.

    With Adam at large rates and one lower step per upper step, z and v do not lag alike and u can
    run away (SMD20 at rates of 0.1): take more lower steps, smaller rates, or a fixed gamma
    (``relative=False``). The watch over ||a|| says so, here from 2.5 times ||grad_v f||. (Dividing
    z by Adam's second moments of v cures SMD20 and makes 20 Newsgroups diverge; scaling q down to
    the least ||a|| stops the flight and leaves u 3 off.)

    Args:
        weight: > 0. With ``relative`` the factor above, otherwise gamma itself.
        growth: >= 0; gamma is multiplied by 1 + growth * (lower steps so far).
        relative: measure ``weight`` in the gradients' scales.

    Raises:
        NondeterministicClosureError: the lower closure draws other data when called again.

    Example:
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> u = torch.tensor([0.0], requires_grad=True)
        >>> v = torch.tensor([0.0], requires_grad=True)
        >>> optimizer = PenaltyBilevelOptimizer(
        ...     [u], [v], upper_lr=0.01, lower_lr=0.05, penalty=ValueGap(weight=10.0)
        ... )
        >>> for _ in range(400):
        ...     loss = optimizer.step(
        ...         lambda: (u**2 + v**2).sum(),      # upper loss f
        ...         lambda: ((1 - u - v) ** 2).sum()  # lower loss g, so v = 1 - u
        ...     )
        >>> abs(u.item() - 0.5) < 5e-2 and abs(v.item() - 0.5) < 5e-2
        True
    """

    name = "value"
    lower_is_map = False
    takes_lower_constraints = False
    shares_evaluation = True

    weight = Number("be a finite number > 0", "without it nothing penalises g")
    growth = Number("be a finite number >= 0", "0 leaves the weight alone")

    _AVERAGE_MEMORY = 0.99
    _CURVATURE_MEMORY = 0.9
    _FADING = 0.5
    _EARLY = 1000  # lower steps, in which D is a tenth of ||z|| or more
    # No noise of a product is in ||a|| here: runs that end well have settled below 1.2 times
    # ||grad_v f||, those that run away or end behind validation data alone are between 3 and 10.
    _SUSPICIOUS = 2.5
    _PATIENCE = 300

    def __init__(
        self,
        weight: float = 10.0,
        growth: float = 0.0,
        relative: bool = True,
    ) -> None:
        self.weight = weight
        self.growth = growth
        self.relative = checked_truth("relative", relative)

    # What to evaluate.

    @property
    def rule(self) -> ValueGap:
        """How gamma and z move is part of the formulation: this object is its own rule."""
        return self

    def evaluate(
        self, losses: Losses, at: Pair, state: ValueGapState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        weight, tracker = state.weight, _tracker(state, at)
        upper_loss, direct = curvature.gradient(losses.upper, at)
        random = RandomState(t.device for t in (*at.upper, *at.lower))
        value, here = curvature.gradient(losses.lower, at)
        with random.replayed():
            value_there, there = _gradient_at(losses.lower, at, tracker, curvature)
        if losses.are_new:
            again = value_there, there
            if state.steps > 0:  # else z = v
                with random.replayed():
                    again = curvature.gradient(losses.lower, at)
            curvature.attempt(
                lambda: check_gradient_repeats((value, here), again, _NEEDS_REPETITION)
            )
        difference = OptionalPair(_minus(here.upper, there.upper), ())
        upper = tuple(
            sum_of_present(f, None if d is None else weight * d)
            for f, d in zip(direct.upper, difference.upper, strict=True)
        )
        blocks = [filled(part, at.lower) for part in (here.lower, there.lower, direct.lower)]
        found = averaged(reduce, at, blocks, upper, (upper_loss, value, value_there))
        residual, pull_back, slope = found.lower
        product = scale(axpy(-1.0, pull_back, residual), weight)
        return Evaluation(
            upper_loss=found.losses[0],
            lower_loss=found.losses[1],
            adjoint=scale(_apart(at.lower, tracker), weight),
            residual=residual,
            adjoint_residual=add(slope, product),
            upper_grad=found.upper,
            slope_norms=norms(slope),
            product_norms=norms(product),
            probe_product=(),
            cost=3,
            tracker=tracker,
            tracker_loss=(found.losses[2],),
            tracker_residual=pull_back,
            upper_used=found.used,
        )

    # How gamma and z move.

    def start(self, lower: Tensors) -> ValueGapState:
        return ValueGapState.at(lower, weight=0.0 if self.relative else self.weight)

    def adjoint(self, state: ValueGapState, residual: Tensors) -> Tensors:
        return state.multiplier

    def lower_update(
        self, state: ValueGapState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, ValueGapState]:
        eps = coarsest_eps(evaluation.tracker)
        seen = self._observed(state, norms, eps)
        # grad_v f / gamma. With grad_v g = 0 so far nothing says how small f is: a step that any
        # later one outweighs, and that shows the curvature.
        weight = seen.weight
        share = 1.0 / weight if weight > 0 else ratio(eps**0.25 * (1 + norms.tracker), norms.slope)
        slope = axpy(
            -state.weight,
            axpy(-1.0, evaluation.tracker_residual, evaluation.residual),
            evaluation.adjoint_residual,
        )
        direction = axpy(share, slope, evaluation.residual)
        return direction, seen.but(
            multiplier=evaluation.adjoint, steps=state.steps + 1, tracker=evaluation.tracker
        )

    def follow(self, state: ValueGapState, evaluation: Evaluation, move: Move) -> ValueGapState:
        tracker, moments = move(state.tracker, evaluation.tracker_residual, state.moments)
        return state.but(tracker=tracker, moments=moments)

    def _observed(self, state: ValueGapState, norms: Norms, eps: float) -> ValueGapState:
        """The numbers after one more evaluation; ``eps`` is the rounding error of v."""
        watch = state.watch.seen(norms, state.steps)
        watch = watch.looked_at(norms, state.steps, self._SUSPICIOUS, self._PATIENCE)
        residual = average(state.residual_square, norms.residual**2, self._AVERAGE_MEMORY)
        new = state.but(watch=watch, residual_square=residual)
        weight = self.weight
        if self.relative:
            new = self._scaled(new, norms, math.sqrt(eps))
            if new.curvature > 0:
                weight *= ratio(new.slope_scale, new.curvature * new.length)
            else:
                weight *= ratio(norms.slope, norms.residual)
        weight *= 1.0 + self.growth * state.steps
        return new.but(weight=weight or state.weight)

    def _scaled(self, old: ValueGapState, norms: Norms, rounding: float) -> ValueGapState:
        """L, D and S."""
        apart = ratio(norms.adjoint, old.weight)
        curvature = old.curvature
        exact = 0.01 * math.sqrt(rounding) * norms.tracker  # differences over less are rounding
        if apart > exact and norms.product > 0:
            now = norms.product / norms.adjoint
            curvature = max(self._CURVATURE_MEMORY * curvature, now)
        fade = (old.steps / (old.steps + 1)) ** self._FADING
        length = ratio(max(math.sqrt(old.residual_square), norms.residual), curvature)
        if curvature > 0:
            floor = max(rounding, 0.1 * (1 + old.steps / self._EARLY) ** -self._FADING)
            length = max(length, fade * old.length, floor * norms.tracker)
        slope = max(math.sqrt(old.watch.slope_square), norms.slope, fade * old.slope_scale)
        return old.but(curvature=curvature, length=length, slope_scale=slope)


def _tracker(state: ValueGapState, at: Pair) -> Tensors:
    """z; before the first step v itself, which may have been loaded after construction."""
    return state.tracker if state.steps > 0 else clones(at.lower)


def _gradient_at(
    loss: Loss, at: Pair, tracker: Tensors, curvature: Curvature
) -> tuple[Tensor, OptionalPair]:
    """g(u, z) and its gradient; live closures read z from the storage of v."""
    if not curvature.reads_live:
        return curvature.gradient(loss, Pair(at.upper, tracker))
    with replaced(at.lower, tracker):
        return curvature.gradient(loss, at)


def _minus(left: OptionalTensors, right: OptionalTensors) -> OptionalTensors:
    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return sum_of_present(a, None if b is None else -b)

    return tuple(one(a, b) for a, b in zip(left, right, strict=True))


def _apart(left: Tensors, right: Tensors) -> Tensors:
    """The difference left - right in at least float32, detached."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in left]
    pairs = zip(left, right, wide, strict=True)
    return tuple(a.detach().to(d) - b.to(d) for a, b, d in pairs)
