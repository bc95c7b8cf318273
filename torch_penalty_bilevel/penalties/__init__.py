"""Formulations of the lower problem, and how to choose one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arguments import chosen
from ..curvature import Curvature, MapCurvature
from ..workers import Reduce as Reduce
from ..workers import one_worker as one_worker
from .fixed_point import FixedPoint as FixedPoint
from .fixed_point import refusal
from .protocol import Losses as Losses
from .protocol import Penalty as Penalty
from .residual import evaluate_residual as evaluate_residual
from .stationarity import Stationarity as Stationarity
from .value_gap import ValueGap as ValueGap

_BY_NAME: dict[str, Callable[[], Penalty]] = {
    "stationarity": Stationarity,
    "paper": lambda: Stationarity("paper"),
    "value": ValueGap,
    "fixed_point": FixedPoint,
}


_ASKED = ("name", "lower_is_map", "takes_lower_constraints", "rule")


def resolve(penalty: str | Penalty, curvature: Curvature) -> Penalty:
    """The penalty behind a name, or the penalty itself, if the engine can serve it.

    Raises:
        ValueError: no penalty has this name, or the engine cannot form its products.
        TypeError: not a penalty, or not all of one.
    """
    formulation = chosen("penalty", penalty, _BY_NAME, "evaluate", "Stationarity()")
    if missing := [name for name in _ASKED if not hasattr(formulation, name)]:
        raise TypeError(
            f"penalty={type(formulation).__name__} lacks {missing}; see penalties.Penalty, which "
            "says what each is"
        )
    if formulation.lower_is_map and not isinstance(curvature, MapCurvature):
        raise ValueError(refusal(curvature))
    return formulation


def is_map(penalty: Any) -> bool:
    """Would the lower level be a map, under what a user gave as ``penalty``?"""
    return bool(penalty == FixedPoint.name or getattr(penalty, "lower_is_map", False))
