"""Engines for second-order products (J q, H q) of the lower loss, and how to choose one by name."""

from __future__ import annotations

from collections.abc import Callable

from ..arguments import chosen
from .automatic import Automatic as Automatic
from .double_backward import DoubleBackward as DoubleBackward
from .finite_difference import FiniteDifference as FiniteDifference
from .protocol import Curvature as Curvature
from .protocol import Linearised as Linearised
from .protocol import Loss as Loss
from .protocol import Map as Map
from .protocol import MapCurvature as MapCurvature
from .torch_func import VectorJacobian as VectorJacobian

_BY_NAME: dict[str, Callable[[], Curvature]] = {
    engine.name: engine for engine in (Automatic, DoubleBackward, FiniteDifference, VectorJacobian)
}


_ASKED = (
    "reads_live",
    "falls_back",
    "takes_differences",
    "point",
    "in_use",
    "reason",
    "exact",
    "packed",
)


def resolve(curvature: str | Curvature, *, weighs_costs: bool = False) -> Curvature:
    """The engine behind a name, or the engine itself; ``weighs_costs`` is for ``"auto"``.

    Raises:
        ValueError: no engine has this name.
        TypeError: not an engine.
    """
    by_name = _BY_NAME | {Automatic.name: lambda: Automatic(weighs_costs)}
    engine = chosen("curvature", curvature, by_name, "linearise", "FiniteDifference()")
    if missing := [name for name in _ASKED if not hasattr(engine, name)]:
        raise TypeError(
            f"curvature={type(engine).__name__} lacks {missing}; subclass "
            "torch_penalty_bilevel.curvature.Curvature, which has a default for each"
        )
    return engine
