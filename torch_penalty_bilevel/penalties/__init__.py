"""Formulations of the lower problem, and how to choose one by name."""

from __future__ import annotations

from collections.abc import Callable

from ..curvature import Curvature, MapCurvature
from .fixed_point import FixedPoint as FixedPoint
from .fixed_point import refusal
from .protocol import Losses as Losses
from .protocol import Penalty as Penalty
from .protocol import Reduce as Reduce
from .protocol import one_worker as one_worker
from .stationarity import Stationarity as Stationarity
from .value_gap import ValueGap as ValueGap

_BY_NAME: dict[str, Callable[[], Penalty]] = {
    "stationarity": Stationarity,
    "paper": lambda: Stationarity("paper"),
    "value": ValueGap,
    "fixed_point": FixedPoint,
}


def resolve(penalty: str | Penalty, curvature: Curvature) -> Penalty:
    """The penalty behind a name, or the penalty itself, if the engine can serve it.

    Raises:
        ValueError: no penalty has this name, or the engine cannot form its products.
        TypeError: not a penalty.
    """
    if isinstance(penalty, str):
        if penalty not in _BY_NAME:
            raise ValueError(
                f"penalty must be one of {sorted(_BY_NAME)} or an object such as "
                f"Stationarity(), got {penalty!r}"
            )
        penalty = _BY_NAME[penalty]()
    if isinstance(penalty, type) or not hasattr(penalty, "evaluate"):
        raise TypeError(
            f"penalty must be a name or an object such as Stationarity(), got {penalty!r}"
        )
    if penalty.lower_is_map and not isinstance(curvature, MapCurvature):
        raise ValueError(refusal(curvature))
    return penalty
