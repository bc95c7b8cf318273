"""``PenaltyBilevelOptimizer``: two levels, two closures, one ordinary torch optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import curvature as engines
from .. import levels, penalties
from ..adapters import closures, own_parts
from ..adapters.closures import Closure, Closures
from ..adapters.constraints import ConstrainedLevels, Constraint
from ..arguments import checked_truth
from ..checks import self_check
from ..checks.report import HypergradientReport
from ..checks.suspicions import DependenceWatch, zeros_in_a_row
from ..curvature import Curvature
from ..evaluation import Evaluation, measure
from ..levels import Parameters, rows, rules
from ..levels.trial_step import stepped
from ..multipliers import Memories
from ..penalties import Losses, Penalty, Reduce
from ..tensors import Pair, Tensors, axpy, clones, is_sharded, shift
from ..undo.buffers import BufferGuard
from ..undo.transaction import rehearsal
from ..workers import Workers, without_unused
from ..workers import resolve as resolve_reduce
from . import sharded
from .plain_steps import TakesPlainSteps
from .two_level import Seen

_ADVICE = self_check.Advice(
    solver="multiplier",
    unsolved="take more lower_steps or warmup_steps, a smaller upper_lr, or add weight decay to g "
    "so that H is better conditioned",
    shifted="the ridge of the rule biases it, as asked for; lower LeastSquares(ridge=...)",
    away="take more lower_steps, a smaller upper_lr, a larger lower_lr or less share",
)


class PenaltyBilevelOptimizer(TakesPlainSteps):
    r"""Solves :math:`\min_u f(u, v)` where v minimises :math:`g(u, \cdot)`, in an ordinary loop.

    The lower problem is replaced by its stationarity and the violation is penalised, with a
    multiplier that learns the adjoint (see ``Stationarity`` and ``LeastSquares``): per lower step
    one gradient of f, one of g and one second-order product; no inverse, no unrolling.

    .. math::
        u \leftarrow \text{upper rule}(\nabla_u f + J q), \qquad
        v \leftarrow \text{lower rule}(d), \qquad q \to -H^{-1}\nabla_v f

    with J = d2g/du dv, H = d2g/dv2 and d the lower direction of the penalty's rule.

    It is a ``torch.optim.Optimizer``: schedulers, hooks, ``state_dict``, ``add_param_group``,
    pickle and deepcopy work on both levels at once; each parameter group says which ``"level"`` it
    belongs to. ``optimizer.upper`` and ``optimizer.lower`` are the two rules inside; register
    step hooks on them to clip gradients. ``optimizer.metrics`` (a ``Metrics``) describes the last
    evaluation and does not wait for the device until a number is read.

    Rows of an upper tensor (entries along dim 0) whose hypergradient is exactly zero do not move,
    and neither do their moments: a sample that was not in the batch keeps its weight.

    Args:
        upper: the upper parameters u: tensors, (name, tensor) pairs, parameter-group dicts, or a
            ready ``torch.optim.Optimizer`` over them, or a list of several (Muon for the matrices,
            Adam for the rest), which then move the level together.
        lower: the lower parameters v, likewise.
        upper_lr: learning rate where an upper group names none (default: 1e-3).
        lower_lr: the same for the lower level (default: 1e-3).
        lower_steps: v-steps before each u-step in ``step``; ``"auto"``: until the certificate
            ||grad_v f + H q|| is at most ``certificate_tolerance`` of ||grad_v f||, so that u waits
            for v and q. With minibatches their noise is in it: then choose a number.
        certificate_tolerance: for ``lower_steps="auto"``, in (0, 1).
        max_lower_steps: of ``"auto"``, per call.
        warmup_steps: ``step`` moves v and the multiplier only, until the certificate
            ||grad_v f + H q|| is at most half of ||grad_v f||, what it is at q = 0; for at most so
            many calls (minibatch noise may keep it above).
        penalty: ``"stationarity"``, ``"paper"`` (the published schedule), ``"value"`` (gradients
            only), ``"fixed_point"`` (the lower closure returns a map Phi(u, v)) or an object.
        curvature: ``"auto"`` (double backward, or finite differences where they must or where
            measured to be cheaper and close, see ``Automatic``; ``.curvature.reason`` says why),
            ``"double_backward"``, ``"finite_difference"``, ``"functional"`` (torch.func; the
            closures are then pure functions of (upper, lower), each a tuple in parameter order or,
            for parameters given with names, a dict) or an object.
        reduce: ``"mean"``: processes share one problem, f and g the means of theirs: each gives
            the mean over its own batch, all of one size, and the step is that of all batches joined
            (a rank with n_r of N samples on W ranks scales its losses by W n_r / N). Closures see
            plain or DDP-wrapped modules. Rows of u that any rank's batch touches move on all.
            Or a function that averages a tuple of tensors. Default: one process.
        process_group: of torch.distributed, for ``"mean"``; default: all processes.
        allow_unused: accept upper parameters that no loss depends on; they do not move.
        upper_constraint: an object of ``constraints``, or a list with any number of ``Inequality``.
            Every upper tensor is in the set after each step; ``p.grad`` is then the part of the
            hypergradient that feasible motion can follow.
        lower_constraint: likewise; the hypergradient is that of the constrained lower problem.
            Needs ``"stationarity"`` or, for a set, ``"paper"``.

    Raises:
        ValueError, TypeError: at construction, naming the argument, its value and the remedy.

    Example:
        >>> import torch
        >>> u = torch.tensor([0.0], requires_grad=True)
        >>> v = torch.tensor([0.0], requires_grad=True)
        >>> optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.02, lower_lr=0.02)
        >>> for _ in range(200):
        ...     loss = optimizer.step(
        ...         lambda: (u**2 + v**2).sum(),      # upper loss f
        ...         lambda: ((1 - u - v) ** 2).sum()  # lower loss g, so v = 1 - u
        ...     )
        >>> abs(u.item() - 0.5) < 1e-2 and abs(v.item() - 0.5) < 1e-2
        True
    """

    _fields = (
        *TakesPlainSteps._fields,
        "lower_steps",
        "certificate_tolerance",
        "max_lower_steps",
        "warmup_steps",
        "penalty",
        "curvature",
        "_workers",
        "allow_unused",
        "_sets",
        "_seen",
        "_dual",
        "_adjoint",
        "_counts",
        "_dependence",
        "_zeros_in_a_row",
    )

    def __init__(
        self,
        upper: Parameters,
        lower: Parameters,
        *,
        upper_lr: float | None = None,
        lower_lr: float | None = None,
        lower_steps: int | Literal["auto"] = 1,
        certificate_tolerance: float = 0.05,
        max_lower_steps: int = 100,
        warmup_steps: int = 0,
        penalty: str | Penalty = "stationarity",
        curvature: str | Curvature = "auto",
        reduce: Literal["mean"] | Reduce | None = None,
        process_group: Any = None,
        allow_unused: bool = False,
        upper_constraint: Constraint | Sequence[Constraint] | None = None,
        lower_constraint: Constraint | Sequence[Constraint] | None = None,
    ) -> None:
        self._workers = Workers(resolve_reduce(reduce, process_group))
        self._build(upper, lower, upper_lr, lower_lr)
        self.lower_steps = lower_steps
        self.certificate_tolerance = certificate_tolerance
        self.max_lower_steps = max_lower_steps
        parts = self.upper, self.lower, self._workers, lower_constraint, penalties.is_map(penalty)
        self.curvature = sharded.served(engines.resolve(curvature, weighs_costs=True), *parts)
        self.penalty = penalties.resolve(penalty, self.curvature)
        self.allow_unused = checked_truth("allow_unused", allow_unused)
        self._sets = ConstrainedLevels(upper_constraint, lower_constraint, self.upper, self.lower)
        self._seen = None
        own_parts.check_engine(self.curvature)
        own_parts.check_penalty(self.penalty, self.curvature)
        beginning = tuple(levels.parameters(self.lower))
        self._dual = self.penalty.rule.start(beginning)
        own_parts.check_state(self.penalty.rule, self._dual, beginning, "start")
        self._sets.check_penalty(self.penalty, self._dual)
        rules.check(self.lower, "lower", self._lower_is_map())
        self._adjoint = self._dual.multiplier
        self._start_waiting(warmup_steps)
        self._dependence = DependenceWatch()
        self._zeros_in_a_row = 0

    def step(  # type: ignore[override]
        self,
        upper_closure: Closures = None,
        lower_closure: Closure | None = None,
        *,
        closure: Closures = None,
    ) -> Tensor:
        """``lower_steps`` updates of v and the multiplier, then one update of u.

        The last lower evaluation also serves the upper update where the rule allows it:
        ``LeastSquares`` is a single-loop method in which all variables move from one point, so a
        step costs ``lower_steps`` evaluations; ``EpsilonTest`` evaluates afresh, as published. Only
        the one that serves u is differentiated with respect to u. Buffers move once per call.

        An evaluation calls each closure once, and g again with the same random numbers for every
        gradient of a ``"finite_difference"``, for the second point of ``"value"`` and where
        ``"auto"`` compares engines. The first call runs uncompiled, to see what closures use, as
        does the first with new lines of code, which calls them once more; it repeats closures
        where the engine is ``"finite_difference"`` or ``"functional"`` or a lower ``Inequality``
        has to show its shape. So a closure may draw its own batch, next(loader), with
        ``"double_backward"``, and, but for the batches that comparisons take, with ``"auto"``:
        every evaluation is then one of another batch. Where g is repeated draw the batch outside.

        Args:
            upper_closure: returns f, 0-d, from live tensors and modules; does not call backward. Or
                a sequence of closures, one per micro-batch: f is the mean of theirs, the step that
                of the joined batch to rounding, the memory that of one (see the README).
            lower_closure: returns g, likewise.
            closure: f again, or both: trainers pass on ``step(closure=f, lower_closure=g)`` and
                ``step((f, g))``.

        Returns:
            f at the last evaluation, detached, 0-d.

        Raises:
            NonFiniteError: a loss, residual or gradient is not finite. As after any exception
                but one raised inside the rules' own steps (by their hooks, or Adam on a sparse
                gradient), parameters, buffers, random generators and state are as before the call.
            NondeterministicClosureError: g was repeated and returned something else, or the same
                with another gradient.
            UnusedParameterError: no loss depends on an upper parameter.
            DoubleBackwardError: an operation has no second derivative (not with ``"auto"``).
        """
        both = self._begun(upper_closure, lower_closure, closure)
        if both is None:
            return torch.zeros(())
        shared = self.penalty.rule.shares_evaluation
        one_evaluation = shared and self.lower_steps == 1
        with self._undone([] if one_evaluation else [self.lower]) as guard:
            losses = self._losses(*both, guard)
            seen = self._descend(losses, shared)
            if not shared:
                seen = self._evaluate(losses, for_upper=True)
                self._adjoint = self._merged(seen.evaluation.adjoint, seen.here)
            self._move_upper(seen, hold=self._warms_up(seen.norms))
        return seen.evaluation.upper_loss

    def lower_step(self, upper_closure: Closure, lower_closure: Closure) -> Tensor:
        """One update of v and of the multiplier, blind to u; returns f. See ``step``."""
        with self._undone([]) as guard:
            losses = self._losses(upper_closure, lower_closure, guard)
            seen = self._move_lower(self._evaluate(losses, for_upper=False))
        return seen.evaluation.upper_loss

    def upper_step(self, upper_closure: Closure, lower_closure: Closure) -> Tensor:
        """One update of u from a fresh evaluation; returns f. See ``step``."""
        with self._undone([]) as guard:
            losses = self._losses(upper_closure, lower_closure, guard)
            seen = self._evaluate(losses, for_upper=True)
            self._adjoint = self._merged(seen.evaluation.adjoint, seen.here)
            self._move_upper(seen)
        return seen.evaluation.upper_loss

    def check_hypergradient(
        self,
        upper_closure: Closure,
        lower_closure: Closure,
        *,
        tolerance: float | None = None,
        max_iterations: int | None = None,
        damping: float = 0.0,
        resolve: bool | None = None,
    ) -> HypergradientReport:
        """Compare the estimate with exact hypergradients; ``print`` the report it returns.

        May cost a thousand steps; moves nothing, also when it raises what ``step`` would.

        Args:
            upper_closure: as in ``step``; draw the batch outside, so that all see the same data.
            lower_closure: likewise.
            tolerance: bound on ||H q + grad_v f|| / ||grad_v f||; None: what the dtype allows.
            max_iterations: products at most; None: ten per lower unknown, at most 1,000.
            damping: lambda >= 0 of the exact solve, (H + lambda I) q = -grad_v f.
            resolve: also take finite differences of f(u, v*(u)), g solved by L-BFGS; None: where
                v has at most 2,000 numbers (one device, not 16 bits) and the closures repeat.
        """
        self._sets.check_comparable()
        sharded.check_comparable(self.lower)
        options = self_check.CheckOptions(tolerance, max_iterations, damping, resolve).checked()
        undone = rehearsal([self.upper, self.lower], self._devices(), self._scope)
        with undone as guard, self._workers.agreeing(self.curvature):
            losses = self._losses(upper_closure, lower_closure, guard)
            here, step = self._here(), self._counts["steps"] + 1
            dual = self._dual.only(self._moving(here))

            def estimate(losses: Losses) -> Evaluation:
                engine = copy.deepcopy(self.curvature)
                at = engine.point(here.at)
                return self.penalty.evaluate(losses, at, dual, *self._shared(engine))

            shift, how = self.penalty.rule.shift(dual), (self.curvature, self._workers, step)
            given = losses, here.at, here.upper_names, estimate, shift, self._lower_is_map()
            return self_check.check(self_check.Subject(*given, *how, _ADVICE), options)

    def _move_lower_together(self, held: list[Seen]) -> Seen:
        """``_move_lower`` of the one in ``held``, which is emptied; one worker may raise alone."""
        rest = held[0]._replace(evaluation=self.penalty.rule.left_for_upper(held[0].evaluation))
        seen = self._workers.attempt(lambda: self._move_lower(held.pop()), lambda: rest)
        self._workers.meet(rest.here.lower[0])
        return seen

    def _move_lower(self, seen: Seen) -> Seen:
        """Returns what is left for u: what v alone needs is let go before its rule takes memory."""
        evaluation, norms, here, moving = seen
        del seen
        rule, lower = self.penalty.rule, here.at.lower
        dual = self._dual.only(moving)
        jump = rule.jump(dual, evaluation, norms)
        if jump is not None:
            jump = jump.shortened(rules.rate_left(self.lower), evaluation.residual, norms)
            evaluation = evaluation._replace(residual=jump.residual)
        direction, advanced = rule.lower_update(dual, evaluation, norms)

        def move(point: Tensors, gradients: Tensors, memory: Memories) -> tuple[Tensors, Memories]:
            return stepped(self.lower, lower, point, norms.heard(gradients), memory)

        advanced = rule.follow(advanced, evaluation, move)
        levels.give(self.lower, norms.heard(direction))
        if not self._sets.lower.multipliers:
            evaluation = rule.left_for_upper(evaluation)
        before = clones(lower) if rule.follows_lower(dual) else ()
        with evaluation.lower_face.retracting(lower):
            if jump is not None:
                shift(lower, jump.move)
            rules.step_without_decay(self.lower)
        if before:
            advanced = rule.followed(advanced, axpy(-1.0, before, tuple(p.detach() for p in lower)))
        advanced = self._sets.lower.ascend_jointly(rule, dual, advanced, evaluation)
        self._dual = self._dual.merged(advanced, moving, here.lower)
        adjoint = rule.adjoint(advanced, evaluation.residual)
        self._adjoint = self._merged(evaluation.lower_face.tangent(adjoint), here)
        return Seen(evaluation, norms, here, moving)

    def _move_upper(self, seen: Seen, hold: bool = False) -> None:
        evaluation, norms, here, moving = seen
        levels.give(self.upper, evaluation.upper_grad)
        if not hold:
            with evaluation.upper_face.retracting(here.at.upper):
                rows.step_touched_rows(self.upper)
            self._sets.upper.ascend(evaluation.upper_values)
        advanced = self.penalty.rule.upper_update(self._dual.only(moving), evaluation, norms)
        self._dual = self._dual.merged(advanced, moving, here.lower)
        self._counts["steps"] += 1

    # One evaluation.

    def _evaluate(self, losses: Losses, *, for_upper: bool) -> Seen:
        """Both losses here; without ``for_upper`` no derivative with respect to u is taken."""
        here = self._here()
        self._dual = self._sets.start(losses, here.at, self._dual, self._workers)
        self._adjoint += self._dual.multiplier[len(self._adjoint) :]
        both = here._replace(at=self._sets.extended(here.at))
        losses = self._look(losses, both)
        split = any(map(is_sharded, here.at.lower))  # their backward pass reaches every leaf
        if not for_upper and self.curvature.reads_live and not split:
            both = both._replace(at=Pair((), both.at.lower), upper_names=[])
        at, names = self.curvature.point(both.at), both.upper_names
        moving = self._moving(here)
        dual = self._dual.only(moving)
        evaluation = self.penalty.evaluate(losses, at, dual, *self._shared(self.curvature))
        evaluation = self._sets.upper.restricted(evaluation, at)
        norms = measure(evaluation, names, self._counts["steps"] + 1, self._counts["slope"])
        gradient = without_unused(evaluation.upper_grad, norms.upper_used)
        evaluation = evaluation._replace(upper_grad=gradient)
        evaluation = self._sets.upper.seen(evaluation, self._workers.reduce)
        self._workers.follow(self.curvature)
        self.curvature.observe(norms.adjoint_residual, norms.slope)
        unused = self._check_used(losses, both, evaluation)
        self._dependence.listen(norms.silent)
        if len(unused) < len(names):
            vanished = norms.upper_grad == 0.0 < norms.adjoint and self._sets.upper.is_free
            self._zeros_in_a_row = zeros_in_a_row(self._zeros_in_a_row, vanished)
        self._certify(norms)
        self._counts["gradient_evaluations"] += evaluation.cost
        cost = self._counts["gradient_evaluations"]
        numbers = dual.weight, dual.damping, self.penalty.rule.correction_gain(dual)
        self._seen = evaluation.upper_loss, evaluation.lower_loss, norms, numbers, cost
        return Seen(evaluation, norms, here, moving)

    def _losses(self, upper: Closure, lower: Closure, guard: BufferGuard) -> Losses:
        levels.release(self.lower)
        rest = self.upper, self.lower, guard, self._made_outside, self.penalty.lower_is_map
        return self._sets.applied(
            closures.losses_of(self.curvature, upper, lower, *rest, self._sets.inequalities)
        )

    def _lower_is_map(self) -> bool:
        return self.penalty.lower_is_map
