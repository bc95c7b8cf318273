"""What solvers of a bilevel problem ask of one run, so that all of them can take the same one.

Letters: u the upper and v the lower variables, f and g the upper and the lower loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from torch_penalty_bilevel.constraints import Box

Values = tuple[Tensor, ...]
Step = Callable[[], None]


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
