"""What every formulation of the lower problem offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..constraints import FacesOf, everywhere
from ..curvature import Curvature, Loss
from ..evaluation import Evaluation
from ..multipliers import MultiplierRule
from ..tensors import Pair, Tensors
from ..workers import Reduce


class Losses(NamedTuple):
    """f, g or Phi, the set that v stays in, and inequalities."""

    upper: Loss
    """(upper, lower) -> f, 0-d."""
    lower: Callable[[Tensors, Tensors], Any]
    """(upper, lower) -> g, 0-d; with ``lower_is_map`` Phi, shaped like ``lower``."""
    lower_faces: FacesOf = everywhere
    """Of the set that v stays in."""
    upper_values: tuple[Loss, ...] = ()
    """h of each upper inequality: (upper, lower) -> a tensor of any shape."""
    lower_values: tuple[Loss, ...] = ()
    """h of each lower inequality."""
    are_new: bool = False
    """Has nothing been evaluated through these lines of code before?"""


class Penalty(Protocol):
    """A formulation of the lower problem."""

    name: str
    lower_is_map: bool
    """Does the lower closure return Phi(u, v) instead of g(u, v)?"""
    takes_lower_constraints: bool
    """Does ``evaluate`` respect ``Losses.lower_faces`` and multipliers at the end of ``lower``?"""

    @property
    def rule(self) -> MultiplierRule:
        """How the multiplier, the weight and whatever else is dual moves."""
        ...

    def evaluate(
        self, losses: Losses, at: Pair, state: Any, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        """All terms at one point."""
        ...
