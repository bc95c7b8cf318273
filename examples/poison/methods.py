"""The rows of the table that optimise the poisons, all on the same ``Attack``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from examples.poison.attack import Attack
from examples.shared.record import Line
from examples.shared.run import Run
from examples.shared.solvers import Solver, anneal, hypergradient
from examples.shared.task import Rates
from torch_penalty_bilevel import PenaltyBilevelOptimizer

LOOKS = 8


class Method(NamedTuple):
    """How to start it, and the gradients and products of a step."""

    start: Callable[[Attack, Rates], Solver]
    cost: Callable[[int], int]
    """Of the number of lower steps; what is reported is the optimizer's own count."""


def ours(task: Attack, rates: Rates) -> Solver:
    """All that the penalty method asks for: both levels, their rates and the set of u."""
    optimizer = PenaltyBilevelOptimizer(
        task.upper,
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        lower_steps=rates.lower_steps,
        upper_constraint=task.upper_constraint,
        curvature="double_backward",
    )
    return Solver(lambda: optimizer.step(task.upper_loss, task.lower_loss), (optimizer,))


def _implicit(method: str, **options: Any) -> Callable[[Any, Rates], Solver]:
    return partial(hypergradient, method=method, curvature="double_backward", **options)


METHODS = {
    "penalty": Method(ours, lambda steps: 3 * steps),
    "approx_grad": Method(
        _implicit("approx_grad", inner_iterations=10, damping=1e-3), lambda steps: steps + 14
    ),
    "cg": Method(_implicit("cg", inner_iterations=10), lambda steps: steps + 14),
    "reverse": Method(_implicit("reverse"), lambda steps: 3 * steps + 3),
    # Without the implicit term: u follows its own terms of f, where f has any.
    "alternating": Method(_implicit("alternating"), lambda steps: steps + 2),
}


def optimise(name: str, task: Attack, rates: Rates, budget: int, run: Run) -> tuple[Tensor, Line]:
    """One method until its budget is spent, both rates falling to 0 along a cosine.

    Args:
        name: of the method.
        task: u = 0, v of clean data.
        rates: of the method.
        budget: gradients and products.
        run: shows and keeps what happens.

    Returns:
        The poisoned images, and what a victim of them does, along the run.
    """
    method = METHODS[name]
    steps = max(1, budget // method.cost(rates.lower_steps))
    solver = method.start(task, rates)
    path: list[Line] = []
    looks = {round(steps * (n + 1) / LOOKS) for n in range(LOOKS)} | {steps}
    for step in run.steps(steps, task.module, task.perturbation, *solver.rules, path):
        anneal(solver.rules, step / steps)
        solver.step()
        if step + 1 in looks:
            with run.paused():
                victim = task.victim(task.with_poisons(task.poisons().detach()))
                metrics: Any = solver.rules[0].metrics  # pyright: ignore
                seen = {"evaluations": metrics.gradient_evaluations, "seconds": run.seconds}
                path.append(seen | task.score(victim))
                run.show(step, **{task.measure: path[-1][task.measure]})
                run.show(step, **{k: v for k, v in metrics.as_dict().items() if v == v})
    ended = {"path": path, "seconds": run.seconds, "evaluations": path[-1]["evaluations"]}
    ended |= {f"running_{k}": v for k, v in task.score(tuple(task.lower)).items()}
    return task.poisons().detach(), ended
