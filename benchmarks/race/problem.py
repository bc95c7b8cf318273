"""What ``race.py`` asks of a problem, and what its methods ask of one run.

Letters: u the upper and v the lower variables, f and g the upper and the lower loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from examples.shared.record import Line
from torch_penalty_bilevel.constraints import Box

Values = tuple[Tensor, ...]


class Task(Protocol):
    """One run: u and v where they are, and the batch at hand.

    Batches come from the global random numbers, because methods that repeat a closure put those
    back. Runs of equal seed begin at equal u and v.
    """

    upper: list[Tensor]
    lower: list[Tensor]
    module: nn.Module
    """Its parameters are ``lower``, for libraries that want a module."""
    upper_constraint: Box | None
    is_new: bool
    """Does every upper step bring a lower problem of its own, v = 0 at its start?"""
    gradient_unit: float
    """Rates of plain gradient steps on v are in this unit."""
    adjoint_step: float | None
    """Step of fixed-point iterations on H q = -grad f; None: the methods' own."""

    def begin(self) -> None:
        """Before every upper step: if ``is_new``, another lower problem, v = 0."""
        ...

    def draw(self) -> Any:
        """A new batch for f and for g, before every v-step; returned, it can be had again."""
        ...

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        """F at u and v as they are, or at others."""
        ...

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: Any = None
    ) -> Tensor:
        """G, likewise."""
        ...

    def held_upper(self, graph: bool = False) -> AbstractContextManager[object]:
        """Inside, u does not move: what depends on u alone is computed once.

        Without ``graph`` the losses are then constant in u.
        """
        ...


class Rates(NamedTuple):
    """What is tuned; ``lower_steps`` is the number of v-steps per u-step."""

    lower: float
    upper: float
    lower_steps: int


class Grid(NamedTuple):
    """All pairs of rates are tried with the first number of v-steps, the best with the others."""

    lower: tuple[float, ...]
    """Of Adam."""
    gradient: tuple[float, ...]
    """In the place of those, for methods whose rule for v is plain gradient descent."""
    upper: tuple[float, ...]
    lower_steps: tuple[int, ...]


Step = Callable[[], None]


class Method(NamedTuple):
    """How to start a method, whose it is, and what is special about its grid."""

    start: Callable[[Any, Rates], Step]
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
