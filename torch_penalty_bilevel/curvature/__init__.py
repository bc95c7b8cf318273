"""Engines for second-order products (J q, H q) of the lower loss, and how to choose one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..choices import chosen
from ..tensors import Pair
from .automatic import Automatic as Automatic
from .double_backward import DoubleBackward as DoubleBackward
from .finite_difference import FiniteDifference as FiniteDifference
from .protocol import Curvature as Curvature
from .protocol import Linearised as Linearised
from .protocol import Loss as Loss
from .protocol import Map as Map
from .protocol import MapCurvature as MapCurvature
from .vector_jacobian import VectorJacobian as VectorJacobian

_BY_NAME: dict[str, Callable[[], Curvature]] = {
    engine.name: engine for engine in (Automatic, DoubleBackward, FiniteDifference, VectorJacobian)
}


def resolve(curvature: str | Curvature, *, weighs_costs: bool = False) -> Curvature:
    """The engine behind a name, or the engine itself; ``weighs_costs`` is for ``"auto"``.

    Raises:
        ValueError: no engine has this name.
        TypeError: not an engine.
    """
    by_name = _BY_NAME | {Automatic.name: lambda: Automatic(weighs_costs)}
    return chosen("curvature", curvature, by_name, "linearise", "FiniteDifference()")


def engine_point(engine: Curvature, at: Pair) -> Pair:
    """``at`` as the engine wants it; what is returned moves with it."""
    if not reads_live(engine):  # no outer graph around torch.func's
        return Pair(tuple(u.detach() for u in at.upper), tuple(v.detach() for v in at.lower))
    return at


def reads_live(engine: Curvature) -> bool:
    """Do losses read the live tensors, whatever point they are asked for?"""
    return not isinstance(engine, VectorJacobian)


def packed(engine: Curvature) -> dict[str, Any]:
    """What a checkpoint needs of an engine."""
    return engine.packed() if isinstance(engine, Automatic) else {}


def unpack(engine: Curvature, saved: dict[str, Any]) -> None:
    """Go on where ``packed`` was called; an engine of another kind goes its own way."""
    if saved and isinstance(engine, Automatic):
        engine.unpack(saved)


def observe(engine: Curvature, adjoint_residual: float, slope: float) -> None:
    """Tell an engine that chooses what came of its products: ||grad_v f + H q||, ||grad_v f||."""
    if isinstance(engine, Automatic):
        engine.observe(adjoint_residual, slope)


def takes_differences(engine: Curvature) -> bool:
    """Are the engine's products differences of gradients, with an error of their own?"""
    current = engine.current if isinstance(engine, Automatic) else engine
    return isinstance(current, FiniteDifference)
