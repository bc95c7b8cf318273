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
    """How to start it, its rates, and the gradients and products of a step."""

    start: Callable[[Cleaning, Rates], Solver]
    rates: Rates
    cost: Callable[[int], int]
    """Of the number of lower steps."""


def ours(task: Cleaning, rates: Rates) -> Solver:
    """The optimizer and its loop body: draw batches, step."""
    optimizer = penalty_optimizer(task, upper_lr=rates.upper, lower_lr=rates.lower)

    def step() -> None:
        task.draw()
        optimizer.step(task.upper_loss, task.lower_loss)

    return Solver(step, (optimizer,))


# Rates by test accuracy of the running model on seeds 100 and 101 of MNIST, the MLP, 50 % noise.
METHODS = {
    "penalty": Method(ours, Rates(3e-3, 1.0, 1), lambda steps: 3),
    # The published schedule with its rates: 3 on u' = u / 2.
    "paper": Method(
        partial(penalty, penalty="paper"), Rates(1e-4, 6.0, 20), lambda steps: 3 * steps
    ),
    "approx_grad": Method(
        partial(hypergradient, method="approx_grad", inner_iterations=5),
        Rates(3e-3, 0.3, 1),
        lambda steps: steps + 8,
    ),
    "torchopt": Method(
        partial(implicit, solve=partial(conjugate_gradients, iterations=5, ridge=0.1)),
        Rates(3e-3, 0.3, 1),
        lambda steps: steps + 8,
    ),
    "higher": Method(unrolled, Rates(1e-3, 0.3, 5), lambda steps: 2 * steps + 1),
}


class Learned(NamedTuple):
    """What a run leaves."""

    weights: Tensor
    line: Line


def learn(name: str, task: Cleaning, rates: Rates, budget: int, run: Run) -> Learned:
    """One method until its budget is spent, both rates falling to 0 along a cosine.

    Args:
        name: of the method.
        task: u = 0 and the first v.
        rates: of the method.
        budget: gradients and products.
        run: shows and keeps what happens.
    """
    method = METHODS[name]
    steps = max(1, budget // method.cost(rates.lower_steps))
    solver = method.start(task, rates)
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
