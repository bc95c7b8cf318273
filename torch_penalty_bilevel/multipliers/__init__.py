"""How the multiplier, the penalty weight and the damping move: two rules behind one protocol.

A rule is a set of constants; what changes lives in a ``DualState`` that goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Callable

from ..arguments import chosen
from .least_squares import LeastSquares
from .protocol import Jump, Memories, Move, MultiplierRule
from .published import EpsilonTest
from .state import DIRECTION, MEMORY, POINT, ZEROS, DualState, along
from .watch import Watch

__all__ = [
    "DIRECTION",
    "MEMORY",
    "POINT",
    "ZEROS",
    "DualState",
    "EpsilonTest",
    "Jump",
    "LeastSquares",
    "Memories",
    "Move",
    "MultiplierRule",
    "Watch",
    "along",
    "resolve",
]

_BY_NAME: dict[str, Callable[[], MultiplierRule]] = {
    "least_squares": LeastSquares,
    "paper": EpsilonTest,
}


def resolve(multiplier: str | MultiplierRule) -> MultiplierRule:
    """The rule behind a name, or the rule itself.

    Raises:
        ValueError: no rule has this name.
        TypeError: not a rule.
    """
    return chosen("multiplier", multiplier, _BY_NAME, "lower_update", "LeastSquares()")
