"""One run of one solver on one problem, as what was seen on the way."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.profiles.problems import Instance, instance
from benchmarks.profiles.solvers import SOLVERS, Rates
from examples.shared.record import Line
from torch_penalty_bilevel import BilevelWarning

GROWTH = 1.3
FIRST_LOOK = 10
ACCURACIES = (0.1, 0.001)
"""tau: the share of the start's distance F - F* that may be left."""


class Trial(NamedTuple):
    """What defines a run."""

    solver: str
    rates: Rates
    problem: str
    seed: int
    budget: int

    @property
    def line(self) -> Line:
        """As in the file of results."""
        return self._asdict() | {"rates": list(self.rates)}


class Over(Exception):
    """u has run off."""


class Looks:
    """F(u) whenever the evaluations have grown by ``GROWTH``, and where a run ends.

    It ends where another step like the last would pass the budget, or at the finest accuracy of a
    known optimum.
    """

    def __init__(self, problem: Instance, budget: int) -> None:
        self.problem, self.budget = problem, budget
        self.path: list[tuple[int, float]] = []
        self.first = self.worth(problem.u, problem.v)
        self.next, self.spent = float(FIRST_LOOK), 0

    def worth(self, u: Tensor, v: Tensor) -> float:
        try:
            return float(self.problem.worth(u, v))
        except (torch.linalg.LinAlgError, ValueError):  # at infinite or NaN u
            return math.nan

    def __call__(self, spent: int, u: Tensor, v: Tensor, last: bool) -> bool:
        self.spent = spent
        if spent > self.budget or (spent < self.next and not last):
            return last
        self.next = spent * GROWTH
        value = self.worth(u, v)
        if math.isnan(value) or not (u.isfinite().all() and v.isfinite().all()):
            raise Over
        self.path.append((spent, value))
        best = self.problem.best
        solved = best is not None and value - best <= min(ACCURACIES) * (self.first - best)
        return last or solved


def run(trial: Trial, data: Path) -> Line:
    """The looks, F at the start and how it ended; whatever a solver raises is a way to end."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(trial.seed)
    problem = instance(trial.problem, trial.seed, data)
    looks = Looks(problem, trial.budget)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BilevelWarning)
        try:
            ended = SOLVERS[trial.solver].run(problem, trial.rates, trial.budget, looks)
        except Over:
            ended = "ran off"
        except Exception as error:  # a failure is kept, with its reason
            ended = f"raised {type(error).__name__}: {str(error)[:200]}"
    # An exactly zero hypergradient is what a finished run has.
    said = [str(w.message) for w in caught if issubclass(w.category, BilevelWarning)]
    alarms = [text for text in said if "exactly zero" not in text]
    return {
        "first": looks.first,
        "best": problem.best,
        "path": looks.path,
        "spent": looks.spent,
        "ended": ended,
        "warned": alarms[0][:200] if alarms else "",
    }
