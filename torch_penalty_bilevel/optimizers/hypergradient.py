"""``HypergradientOptimizer``: differentiate through the lower level instead of penalising it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import curvature as engines
from .. import levels
from ..adapters import closures, own_parts
from ..adapters.closures import Closure, Closures
from ..adapters.constraints import Constraint, upper_projection
from ..arguments import checked_truth
from ..checks import self_check
from ..checks.report import HypergradientReport
from ..checks.suspicions import DependenceWatch
from ..constraints import NO_FACES
from ..curvature import Curvature
from ..errors import AdjointError
from ..evaluation import Evaluation, Norms, measure
from ..hypergradients import (
    IMPLICIT,
    Count,
    Estimate,
    LocalProblem,
    MethodOptions,
    Visit,
    check_loop,
    check_products,
    check_serves_maps,
    count_at,
    estimated,
    learning_rates,
    restart,
    take_lower_steps,
)
from ..levels import Parameters, rows, rules
from ..linear_solve import MakeOptimizer
from ..metrics import Metrics
from ..penalties import Losses, Reduce
from ..tensors import Tensors, clones, zeros_for
from ..undo.buffers import BufferGuard
from ..undo.transaction import rehearsal
from ..workers import Workers, without_unused
from ..workers import resolve as resolve_reduce
from . import sharded
from .hypergradient_memory import RemembersAdjoint
from .two_level import Here

_OF_LEARNING_RATE = ("neumann", "fixed_point", "stochastic", "one_step")


class HypergradientOptimizer(RemembersAdjoint):
    r"""Bilevel optimisation by hypergradients: lower steps on g, an adjoint, an upper step.

    .. math::
        v \leftarrow \text{lower rule}(\nabla_v g)\ \text{(}T\text{ times)}, \qquad
        H q \approx -\nabla_v f, \qquad
        u \leftarrow \text{upper rule}(\nabla_u f + J q)

    with J = d2g/du dv, H = d2g/dv2; of a map Phi the lower rule gets v - Phi and H is
    (I - dPhi/dv)', J is -(dPhi/du)'. What ``PenaltyBilevelOptimizer`` is compared with, in the
    same API: checkpoints, schedulers, hooks, ``metrics`` and all-or-nothing steps work as there.

    Args:
        upper: the upper parameters u, as for ``PenaltyBilevelOptimizer``.
        lower: the lower parameters v, likewise.
        method: how q is found, see ``functional.hypergradient``: ``"cg"``, ``"cg_normal"``,
            ``"neumann"``, ``"fixed_point"``, ``"stochastic"`` (the lower closure is called anew for
            every product), ``"reverse"`` (through the lower steps, which are then plain SGD: v is
            put back to each and the closure repeated on the same random numbers),
            ``"one_step"`` (T1-T2), ``"approx_grad"`` (ApproxGrad), ``"alternating"`` (q = 0).
        upper_lr: learning rate where an upper group names none (default: 1e-3).
        lower_lr: the same for the lower level.
        lower_steps: T, or a function of the step's number (0, 1, ...), for lower problems that are
            solved ever more accurately.
        inner_iterations: products (optimizer steps for ``"stochastic"``) per adjoint at most,
            likewise; default 10.
        warm_start: True: v and q start where the step before ended. False: v starts from its
            first values with a fresh lower rule, q from zero. ``"lower"``, ``"adjoint"``: only
            that one is kept. Methods that do not solve for q have no start for it.
        lower_is_map: the lower closure returns Phi(u, v).
        curvature: as for ``PenaltyBilevelOptimizer``.
        reduce: as for ``PenaltyBilevelOptimizer``: ``"mean"`` over the processes, which share one
            problem, or a function that averages a tuple of tensors; default: one process.
        process_group: of torch.distributed, for ``"mean"``; default: all processes.
        allow_unused: accept upper parameters that no loss depends on; they do not move.
        upper_constraint: a projection of ``constraints``: projected hypergradient descent.
        tolerance, damping, truncation, samples: as in ``functional.hypergradient``; tolerance of
            methods that solve for q.
        step_size: likewise, but of ``"reverse"``; default: 1 for a map, else the lower level's
            smallest learning rate.
        linear_optimizer: likewise, ``"stochastic"`` and ``"approx_grad"``; made anew in every step.

    Raises:
        ValueError, TypeError: at construction, naming the argument, its value and the remedy.

    Example:
        >>> import torch
        >>> u = torch.tensor([0.0], requires_grad=True)
        >>> v = torch.tensor([0.0], requires_grad=True)
        >>> optimizer = HypergradientOptimizer([u], [v], upper_lr=0.02, lower_lr=0.02)
        >>> for _ in range(300):
        ...     loss = optimizer.step(
        ...         lambda: (u**2 + v**2).sum(),      # upper loss f
        ...         lambda: ((1 - u - v) ** 2).sum()  # lower loss g, so v = 1 - u
        ...     )
        >>> abs(u.item() - 0.5) < 1e-2 and abs(v.item() - 0.5) < 1e-2
        True
    """

    _fields = (
        *RemembersAdjoint._fields,
        "method",
        "lower_steps",
        "inner_iterations",
        "warm_start",
        "lower_is_map",
        "curvature",
        "_workers",
        "allow_unused",
        "_options",
        "_restriction",
        "metrics",
        "_adjoint",
        "_first_lower",
        "_counts",
        "_dependence",
    )

    def __init__(
        self,
        upper: Parameters,
        lower: Parameters,
        *,
        method: str = "cg",
        upper_lr: float | None = None,
        lower_lr: float | None = None,
        lower_steps: Count = 1,
        inner_iterations: Count | None = None,
        warm_start: bool | str = True,
        lower_is_map: bool = False,
        curvature: str | Curvature = "auto",
        reduce: Literal["mean"] | Reduce | None = None,
        process_group: Any = None,
        allow_unused: bool = False,
        upper_constraint: Constraint | None = None,
        tolerance: float | None = None,
        damping: float | None = None,
        step_size: float | None = None,
        truncation: int | None = None,
        linear_optimizer: MakeOptimizer | None = None,
        samples: int | None = None,
    ) -> None:
        self._options = MethodOptions(
            tolerance=tolerance,
            damping=damping,
            step_size=step_size,
            truncation=truncation,
            linear_optimizer=linear_optimizer,
            samples=samples,
        )
        check_loop(method, self._options, lower_steps, inner_iterations, warm_start)
        make_lower = torch.optim.SGD if method == "reverse" else torch.optim.Adam
        self._workers = Workers(resolve_reduce(reduce, process_group))
        self._build(upper, lower, upper_lr, lower_lr, make_lower)
        self.method = method
        self.lower_steps = lower_steps
        self.inner_iterations = 10 if inner_iterations is None else inner_iterations
        self.warm_start = warm_start
        self.lower_is_map = checked_truth("lower_is_map", lower_is_map)
        engine = engines.resolve(curvature)
        parts = self.upper, self.lower, self._workers, None, self.lower_is_map
        self.curvature = sharded.served(engine, *parts)
        own_parts.check_engine(self.curvature)
        self.allow_unused = checked_truth("allow_unused", allow_unused)
        self._restriction = upper_projection(upper_constraint, self.upper)
        self.metrics = Metrics.unknown()
        self._adjoint = zeros_for(levels.parameters(self.lower))
        self._first_lower: Tensors = ()
        self._counts = {"steps": 0, "gradient_evaluations": 0}
        self._dependence = DependenceWatch()
        if self.lower_is_map:
            check_serves_maps(self.curvature)
        rules.check(self.lower, "lower", self.lower_is_map)

    def step(  # type: ignore[override]
        self,
        upper_closure: Closures = None,
        lower_closure: Closure | None = None,
        *,
        closure: Closures = None,
    ) -> Tensor:
        """``lower_steps`` updates of v, an adjoint, one update of u.

        Closures are as for ``PenaltyBilevelOptimizer.step``; one that draws a batch draws a fresh
        one for every lower step and one for the adjoint equation (``"stochastic"``: for each of
        its products). BatchNorm statistics move once per call. The first call (of new lines of
        code) evaluates both losses once more, uncompiled, to see what they use.

        Args:
            upper_closure: returns f, 0-d, from live tensors; does not call backward.
            lower_closure: returns g, 0-d, or with ``lower_is_map`` Phi, shaped like v.
            closure: see ``PenaltyBilevelOptimizer.step``.

        Returns f at the end of the lower steps, detached, 0-d.

        Raises:
            NonFiniteError: a loss or a gradient is not finite. As after any exception (but one
                inside the upper rule's own step), parameters, buffers, random generators and state
                are as before the call.
            AdjointError: the solver broke down; its ``status`` says how, ``"negative_curvature"``
                for instance, its text what to try.
            UnusedParameterError: no loss depends on an upper parameter.
            NondeterministicClosureError: ``"reverse"`` met other data when it repeated a step.
        """
        both = self._begun(upper_closure, lower_closure, closure)
        if both is None:
            return torch.zeros(())
        with self._undone([self.lower]) as guard:
            return self._step(self._losses(*both, guard))

    def lower_step(self, upper_closure: Closure, lower_closure: Closure) -> Tensor:
        """One update of v, blind to u; returns f before it. See ``step``."""
        with self._undone([self.lower]) as guard:
            losses, here = self._losses(upper_closure, lower_closure, guard), self._here()
            self._look(losses, here)
            problem = self._problem(losses, here)
            with torch.no_grad():
                loss = problem.upper_loss()
            take_lower_steps(problem, self.lower, 1, 0)
            self._counts["gradient_evaluations"] += problem.evaluations
        return loss

    def upper_step(self, upper_closure: Closure, lower_closure: Closure) -> Tensor:
        """An adjoint at v as it is and one update of u; returns f. See ``step``.

        Raises:
            ValueError: ``"reverse"`` goes back through the lower steps of ``step``.
        """
        self._check_needs_no_steps("upper_step")
        with self._undone([]) as guard:
            losses, here = self._losses(upper_closure, lower_closure, guard), self._here()
            self._look(losses, here)
            loss = self._raise(losses, here, self._problem(losses, here), ())
        return loss

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
        """What ``upper_step`` would apply here beside exact hypergradients; moves nothing.

        Arguments and report are those of ``PenaltyBilevelOptimizer.check_hypergradient``. Where
        ``step`` would raise ``AdjointError`` the report says why there is no estimate.

        Raises:
            ValueError: as ``upper_step``; or the lower level is a map.
        """
        self._check_needs_no_steps("check_hypergradient")
        sharded.check_comparable(self.lower)
        options = self_check.CheckOptions(tolerance, max_iterations, damping, resolve).checked()
        undone = rehearsal([self.upper, self.lower], self._devices(), self._scope)
        with undone as guard, self._workers.agreeing(self.curvature):
            losses, here = self._losses(upper_closure, lower_closure, guard), self._here()
            number = self._counts["steps"]

            def estimate(losses: Losses) -> Evaluation:
                problem = self._problem(losses, here, copy.deepcopy(self.curvature))
                found = estimated(problem, self.method, self._options_at(number))
                return self._solved(found, problem).on_face(NO_FACES, 0)

            shift, how = self._options.damping or 0.0, (self.curvature, self._workers, number + 1)
            given = losses, here.at, here.upper_names, estimate, shift, self.lower_is_map
            return self_check.check(self_check.Subject(*given, *how, self._advice()), options)

    def _advice(self) -> self_check.Advice:
        iterates = self.method in IMPLICIT
        other = f'method="{self.method}" is not exact by design; take "cg" or "cg_normal"'
        return self_check.Advice(
            solver="adjoint",
            unsolved="raise inner_iterations or lower the tolerance" if iterates else other,
            shifted="damping biases it, as asked for; lower it",
            away="take more lower_steps, a smaller upper_lr or a larger lower_lr",
        )

    def _check_needs_no_steps(self, what: str) -> None:
        if self.method == "reverse":
            raise ValueError(
                f'{what} has no lower steps to go back through, as method="reverse" does; use '
                'step, or another method ("cg" solves the same equation)'
            )

    def _losses(self, upper: Closure, lower: Closure, guard: BufferGuard) -> Losses:
        rest = self.upper, self.lower, guard, self._made_outside, self.lower_is_map
        return closures.losses_of(self.curvature, upper, lower, *rest)

    def _problem(self, losses: Losses, here: Here, engine: Curvature | None = None) -> LocalProblem:
        place = f"in step {self._counts['steps'] + 1}; nothing was changed"
        shared, reduce = self._shared(engine or self.curvature)
        at, is_map = (losses, here.at, shared), self.lower_is_map
        return LocalProblem(*at, lower_is_map=is_map, reduce=reduce, place=place)

    def _step(self, losses: Losses) -> Tensor:
        number, here = self._counts["steps"], self._here()
        self._look(losses, here)
        problem = self._problem(losses, here)
        if self.warm_start not in (True, "lower"):
            # Not the v of construction: parameters may have been loaded since.
            self._first_lower = self._first_lower or clones(levels.parameters(self.lower))
            restart(self.lower, self._first_lower)
        steps = count_at("lower_steps", self.lower_steps, number)
        kept = (self._options.truncation or steps) if self.method == "reverse" else 0
        visits = take_lower_steps(problem, self.lower, steps, kept)
        return self._raise(losses, here, problem, visits)

    def _raise(
        self, losses: Losses, here: Here, problem: LocalProblem, visits: Sequence[Visit]
    ) -> Tensor:
        """An adjoint, and the upper step; returns f."""
        number = self._counts["steps"]
        found = estimated(problem, self.method, self._options_at(number), visits)
        estimate = self._solved(found, problem)
        face = self._restriction.faces(here.at.upper, estimate.hypergradient)
        evaluation = estimate.on_face(face, problem.evaluations, problem.used)
        measured = measure(evaluation, here.upper_names, number + 1)
        self._workers.follow(self.curvature)
        gradient = without_unused(evaluation.upper_grad, measured.upper_used)
        evaluation = evaluation._replace(upper_grad=gradient)
        self._check_used(losses, here, evaluation, self.method == "alternating")
        self._dependence.listen(measured.silent)
        self._record(evaluation, measured)
        levels.give(self.upper, evaluation.upper_grad)
        with evaluation.upper_face.retracting(here.at.upper):
            rows.step_touched_rows(self.upper)
        return evaluation.upper_loss

    def _solved(self, estimate: Estimate, problem: LocalProblem) -> Estimate:
        """``estimate``, if there is one."""
        if estimate.solution.broke_down:
            raise AdjointError(estimate.solution.status, estimate.solution.message, problem.place)
        return estimate

    def _options_at(self, number: int) -> MethodOptions:
        options = self._options
        given = options.step_size is not None or options.linear_optimizer is not None
        if not given and self.method in _OF_LEARNING_RATE:
            step = 1.0 if self.lower_is_map else min(learning_rates(self.lower))
            options = replace(options, step_size=step)
        if self.method not in IMPLICIT:
            return options
        start = None
        if number > 0 and self.warm_start in (True, "adjoint"):
            moving = [p.requires_grad for p in levels.parameters(self.lower)]
            start = tuple(q for q, moves in zip(self._adjoint, moving, strict=True) if moves)
        limit = count_at("inner_iterations", self.inner_iterations, number)
        check_products(self.method, options, "inner_iterations", limit)
        return replace(options, start=start, max_iterations=limit)

    def _record(self, evaluation: Evaluation, measured: Norms) -> None:
        fresh = iter(evaluation.adjoint)
        pairs = zip(self._adjoint, levels.parameters(self.lower), strict=True)
        self._adjoint = tuple(next(fresh) if p.requires_grad else q for q, p in pairs)
        self._counts["steps"] += 1
        self._counts["gradient_evaluations"] += evaluation.cost
        weights = 0.0, self._options.damping or 0.0, math.nan
        seen = evaluation.upper_loss, evaluation.lower_loss
        self.metrics = Metrics.of(*seen, measured, weights, self._counts["gradient_evaluations"])

    def _lower_is_map(self) -> bool:
        return self.lower_is_map
