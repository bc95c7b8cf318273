"""What ``race.py`` asks of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from examples.shared.record import Line
from examples.shared.solvers import Solver
from examples.shared.task import Rates, Task


class Grid(NamedTuple):
    """All pairs of rates are tried with the first number of v-steps, the best with the others."""

    lower: tuple[float, ...]
    """Of Adam."""
    gradient: tuple[float, ...]
    """In the place of those, for methods whose rule for v is plain gradient descent."""
    upper: tuple[float, ...]
    lower_steps: tuple[int, ...]


class Method(NamedTuple):
    """How to start a method, whose it is, and what is special about its grid."""

    start: Callable[[Any, Rates], Solver]
    group: str
    """ours, ours (reference), peer or simple."""
    lower_steps: tuple[int, ...]
    lower: tuple[float, ...]


class Picture(NamedTuple):
    """Of the first score against time; ``marks``: rows without a path to show, and how."""

    label: str
    bottom: float
    marks: Mapping[str, str]


class Problem(NamedTuple):
    """A problem of the race."""

    conditions: Mapping[str, Line]
    """By the title of a table: what its runs are recorded under."""
    tuning: Line
    """The condition, likewise, and the seed for tuning."""
    upper: tuple[float, ...]
    """The grid of upper rates."""
    methods: Mapping[str, Method]
    make: Callable[[Line], Any]
    """The data of a condition and a seed."""
    start: Callable[[Any], Task]
    look: Callable[[Any], Line]
    """What a run is worth; all numbers with a name in ``scores`` are the better the larger."""
    baselines: Callable[[Any], Line]
    """The rows that take no steps."""
    scores: Mapping[str, str]
    """How the tables call the scores; the first chooses rates."""
    targets: tuple[tuple[str, float], ...]
    """Shares of the best score."""
    ended: Mapping[str, str]
    """What baselines call a score where they call it otherwise."""
    picture: Picture
    growth: float
    """How much the clock grows from look to look."""
