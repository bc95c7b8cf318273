"""One L2 weight per word of 20 Newsgroups for ``race.py``: the problem of ``examples/tune_l2``.

u: the log weights of 2,000 words, in a box; v: the coefficients of a softmax regression; f and g
on all 2,000 validation and 2,000 training posts, no batches. A running v may be good because it was
stopped early or was pulled towards f, so u is judged at v*(u), by L-BFGS to the end.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.race.methods import methods_of
from benchmarks.race.problem import Grid, Method, Picture
from benchmarks.race.problem import Problem as RaceProblem
from examples.data.mirrors import default_folder
from examples.shared.record import Line
from examples.shared.task import Values
from examples.tune_l2.problem import Problem, lower_loss, make_problem
from examples.tune_l2.rows import GLOBAL_WEIGHTS, one_weight
from torch_penalty_bilevel import LeastSquares, Stationarity
from torch_penalty_bilevel.constraints import Box

# The least u is that of the example, too.
FEATURES, POSTS, LEAST = 2000, 4000, -4.0
GRID = Grid(lower=(0.1, 0.3), gradient=(0.5, 1.0), upper=(0.1, 0.3), lower_steps=(1, 10, 40))


class Coefficients(nn.Module):
    """V as a module."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(start)


class Task:
    """One run; u and v start at 0."""

    is_new = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        u, v = problem.start()
        self.module = Coefficients(v.detach())
        self.upper, self.lower = [u], list(self.module.parameters())
        self.upper_constraint = Box(LEAST, max(problem.largest, 0.0))
        # Cross entropy and L2 term curve by at most ``smoothness`` each.
        self.gradient_unit = 1 / problem.smoothness
        self.adjoint_step = 1 / (2 * problem.smoothness)
        self.solved = problem.solved(u, v)
        self.first = problem.validation.loss(self.solved).item()

    def begin(self) -> None:
        """V goes on where it ended."""

    def draw(self) -> None:
        """No batches."""

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        return self.problem.validation.loss((v or self.lower)[0])

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: None = None
    ) -> Tensor:
        return lower_loss(self.problem.train, (u or self.upper)[0], (v or self.lower)[0])

    def held_upper(self, graph: bool = False) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


def look(task: Task) -> Line:
    """What u is worth: v solved to the end, from where the look before ended."""
    problem, (v,) = task.problem, task.lower
    task.solved = problem.solved(task.upper[0], task.solved)
    loss = problem.validation.loss(task.solved).item()
    running = problem.validation.loss(v.detach()).item()
    return {
        "gain": task.first - loss,
        "test": problem.test.accuracy(task.solved),
        "loss": loss,
        "running": running,
    }


def baselines(problem: Problem) -> Line:
    """One L2 weight from a grid by validation loss, and none at all."""
    first = Task(problem).first
    rows = {}
    for name, weights in (("one L2 weight", GLOBAL_WEIGHTS), ("no L2", np.zeros(1))):
        _, row = one_weight(problem, weights)
        loss = row["validation"]
        rows[name] = {**row, "loss": loss, "gain": first - loss, "first": first}
    return rows


def _methods() -> dict[str, Method]:
    # "auto" trusts no custom product; the one with the sparse matrix is linear.
    methods = methods_of(GRID, curvature="double_backward")
    default = methods.pop("penalty (default)")
    unpulled = partial(default.start, penalty=Stationarity(LeastSquares(share=0.0)))
    waiting = default._replace(lower_steps=(1,))  # counted by the optimizer
    ours = {
        "penalty (default)": default,
        "penalty, no pull": default._replace(start=unpulled),
        "penalty, waiting": waiting._replace(start=partial(default.start, lower_steps="auto")),
        "penalty, waiting, no pull": waiting._replace(start=partial(unpulled, lower_steps="auto")),
    }
    return ours | methods


def l2_race(folder: Path | None) -> RaceProblem:
    """The race on 20 Newsgroups."""
    place = folder or default_folder("20newsgroups")

    def make(condition: Line) -> Problem:
        return make_problem("newsgroups", condition["seed"], place, FEATURES, POSTS)

    return RaceProblem(
        conditions={"20 Newsgroups": {"problem": "l2"}},
        tuning={"problem": "l2", "seed": 100},
        upper=GRID.upper,
        methods=_methods(),
        make=make,
        start=Task,
        look=look,
        baselines=baselines,
        scores={"gain": "gain", "test": "test accuracy"},
        targets=(("gain", 0.95), ("gain", 0.995)),
        ended={},
        picture=Picture("fall of the re-solved validation loss", 0.0, {"one L2 weight": "s"}),
        growth=1.5,
    )
