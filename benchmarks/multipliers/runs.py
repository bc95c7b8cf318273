"""One run of one rule: the error of its hypergradient along the way, and how it ends."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.multipliers import problems, reference
from benchmarks.multipliers.exact import Exact
from benchmarks.multipliers.names import RULES, WHOLE_STEPS
from benchmarks.multipliers.problems import Task
from torch_penalty_bilevel import (
    BilevelWarning,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.curvature import Curvature
from torch_penalty_bilevel.evaluation import Evaluation
from torch_penalty_bilevel.multipliers import DualState
from torch_penalty_bilevel.penalties import Losses, Reduce
from torch_penalty_bilevel.tensors import Pair


class Job(NamedTuple):
    """What defines a run."""

    rule: str
    problem: str
    seed: int
    data: Path
    share: float
    """Of the upper steps."""


class Look(NamedTuple):
    """Errors of the hypergradient in one step; see ``reference``."""

    here: float
    """Against the exact one at the same (u, v): the multiplier's."""
    solved: float
    """Against that at (u, v*(u)): v's as well. NaN where v*(u) is out of reach."""


class End(NamedTuple):
    """What came of a run; infinite where it raised an error or ran off."""

    here: float
    """The median over the looks."""
    solved: float
    score: float
    cost: float
    """Gradients and products per lower step."""
    warned: bool


class Watched(Stationarity):
    """The penalty; it keeps where the last evaluation was made, and with which q."""

    def evaluate(
        self, losses: Losses, at: Pair, state: DualState, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        evaluation = super().evaluate(losses, at, state, curvature, reduce)
        self.v = at.lower[0].detach().clone()
        self.q = evaluation.adjoint[0]
        return evaluation


def optimizer_of(task: Task, rule: str) -> tuple[PenaltyBilevelOptimizer, Watched, Tensor, Tensor]:
    """The optimizer, its penalty, and the u and v that it moves."""
    u, v = (t.detach().clone().requires_grad_() for t in (task.u, task.v))
    penalty = Watched(RULES[rule]())
    lower = (
        torch.optim.SGD([v], lr=1.0)
        if rule in WHOLE_STEPS
        else torch.optim.Adam([v], lr=task.lower_lr)
    )
    optimizer = PenaltyBilevelOptimizer(
        [u],
        lower,
        upper_lr=task.upper_lr,
        lower_steps=task.lower_steps,
        warmup_steps=task.steps // 20 if task.decays else 0,
        penalty=penalty,
    )
    # Not earlier: the optimizer first tries a rule that it does not know on a small problem.
    if isinstance(penalty.rule, Exact):
        penalty.rule.take(lambda: task.adjoint(u, v), task.lower_steps)
    return optimizer, penalty, u, v


def look(task: Task, u: Tensor, v: Tensor, q: Tensor) -> Look:
    """The errors of grad_u f + J q of all data, at the (u, v) where q was used.

    Without minibatches that is the step's hypergradient. With them the sum is that of all data,
    so that the batch's own noise in f and J, which no rule can help, is not in the error.
    """
    f, g = task.f, task.g
    estimate = reference.with_adjoint(f, g, u, v, q)
    here = reference.with_adjoint(f, g, u, v, task.adjoint(u, v))
    if task.solved is None:
        return Look(reference.error(estimate, here), math.nan)
    best = task.solved(u, v)
    solved = reference.with_adjoint(f, g, u, best, task.adjoint(u, best))
    return Look(reference.error(estimate, here), reference.error(estimate, solved))


def followed(task: Task, rule: str, share: float = 1.0) -> End:
    """One run."""
    steps = max(1, int(share * task.steps))
    at = {round(steps * (k + 1) / task.looks) for k in range(task.looks)}
    optimizer, penalty, u, v = optimizer_of(task, rule)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    looks: list[Look] = []
    failed = End(math.inf, math.inf, math.inf, math.nan, False)
    for step in range(1, steps + 1):
        f, g = (task.f, task.g) if task.batch is None else task.batch()
        before = u.detach().clone()
        try:
            optimizer.step(lambda f=f: f(u, v), lambda g=g: g(u, v))  # type: ignore[misc]
        except NonFiniteError:
            return failed
        if task.decays:
            falling.step()
        if step in at:
            looks.append(look(task, before, penalty.v, penalty.q))
    score = float(task.score(u.detach(), v.detach()))
    if not (math.isfinite(score) and all(math.isfinite(each.here) for each in looks)):
        return failed
    here, solved = (statistics.median(errors) for errors in zip(*looks, strict=True))
    cost = optimizer.metrics.gradient_evaluations / (task.lower_steps * steps)
    return End(here, solved, score, cost, False)


def run(job: Job) -> End:
    """One rule on one problem from one seed."""
    torch.set_num_threads(1)
    task = problems.make(job.problem, job.seed, job.data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BilevelWarning)
        end = followed(task, job.rule, job.share)
    # An exactly zero hypergradient is what a finished run has.
    alarms = [w for w in caught if "exactly zero" not in str(w.message)]
    return end._replace(warned=bool(alarms))
