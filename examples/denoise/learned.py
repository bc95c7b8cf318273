"""The rows of the table that learn one weight per sample, all on the same ``Cleaning``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from examples.denoise.formulation import Cleaning, penalty_optimizer
from examples.denoise.problem import Problem
from examples.denoise.rows import accuracy
from examples.denoise.settings import Chosen
from examples.shared.record import Line
from examples.shared.run import Run
from examples.shared.solvers import (
    Solver,
    anneal,
    conjugate_gradients,
    hypergradient,
    implicit,
    penalty,
    unrolled,
)
from examples.shared.task import Rates

LOOKS = 12


class Method(NamedTuple):
    """How to start it, and the gradients and products of a step."""

    start: Callable[..., Solver]
    """Takes a ``Cleaning``, its rates, and options of the data set."""
    cost: Callable[[int], int]
    """Of the number of lower steps."""


def ours(task: Cleaning, rates: Rates, ridge: float = 0.0) -> Solver:
    """The optimizer and its loop body: draw batches, step."""
    optimizer = penalty_optimizer(task, rates.upper, rates.lower, ridge)

    def step() -> None:
        task.draw()
        optimizer.step(task.upper_loss, task.lower_loss)

    return Solver(step, (optimizer,))


def torchopt(task: Cleaning, rates: Rates, ridge: float) -> Solver:
    """Its implicit differentiation, by conjugate gradients."""
    return implicit(task, rates, partial(conjugate_gradients, iterations=5, ridge=ridge))


METHODS = {
    "penalty": Method(ours, lambda steps: 3),
    "paper": Method(partial(penalty, penalty="paper"), lambda steps: 3 * steps),
    "approx_grad": Method(
        partial(hypergradient, method="approx_grad", inner_iterations=5), lambda steps: steps + 8
    ),
    "torchopt": Method(torchopt, lambda steps: steps + 8),
    "higher": Method(unrolled, lambda steps: 2 * steps + 1),
}


class Learned(NamedTuple):
    """What a run leaves."""

    weights: Tensor
    line: Line


def learn(name: str, task: Cleaning, chosen: Chosen, budget: int, run: Run) -> Learned:
    """One method until its budget is spent, both rates falling to 0 along a cosine.

    Args:
        name: of the method.
        task: u = 0 and the first v.
        chosen: rates and options of the method.
        budget: gradients and products.
        run: shows and keeps what happens.
    """
    method, rates = METHODS[name], chosen.rates
    steps = max(1, budget // method.cost(rates.lower_steps))
    solver = method.start(task, rates, **chosen.options)
    path: list[Line] = []
    looks = {round(steps * (n + 1) / LOOKS) for n in range(LOOKS)} | {steps}
    kept = (task.module, task.weights, *solver.rules, path)
    for step in run.steps(steps, *kept):
        anneal(solver.rules, step / steps)
        solver.step()
        if step + 1 in looks:
            with run.paused():
                path.append({"step": step + 1, "seconds": run.seconds, **seen(task)})
                run.show(step, **{k: path[-1][k] for k in ("accuracy", "told_right")})
                metrics = getattr(solver.rules[0], "metrics", None)
                if metrics is not None:
                    run.show(step, **{k: v for k, v in metrics.as_dict().items() if v == v})
    weights = task.weights().detach()
    ended = {"running": path[-1]["accuracy"], "path": path, "seconds": run.seconds}
    ended |= {"steps": steps, "evaluations": steps * method.cost(rates.lower_steps)}
    return Learned(weights, ended)


@torch.no_grad()
def seen(task: Cleaning) -> Line:
    """Of the running model and the weights."""
    problem = task.problem
    told = score(task.weights(), problem)
    return {
        "accuracy": accuracy(task.module, problem.test_images, problem.test_labels),
        "told_right": told["told_right"],
    }


def score(scores: Tensor, problem: Problem) -> Line:
    """How well scores in [0, 1] tell right labels from wrong; above one half says "right"."""
    is_right = problem.is_right
    return {
        "told_right": ((scores > 0.5) == is_right).float().mean().item(),
        "auc": float(roc_auc_score(is_right.cpu(), scores.cpu())),
    }
