"""Engines for second-order products (J q, H q) of the lower loss, and how to choose one by name."""

from __future__ import annotations

from collections.abc import Callable

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


def resolve(curvature: str | Curvature) -> Curvature:
    """The engine behind a name, or the engine itself.

    Raises:
        ValueError: no engine has this name.
        TypeError: not an engine.
    """
    return chosen("curvature", curvature, _BY_NAME, "linearise", "FiniteDifference()")


def engine_point(engine: Curvature, at: Pair) -> Pair:
    """``at`` as the engine wants it; what is returned moves with it."""
    if isinstance(engine, VectorJacobian):  # no outer graph around torch.func's
        return Pair(tuple(u.detach() for u in at.upper), tuple(v.detach() for v in at.lower))
    return at


def takes_differences(engine: Curvature) -> bool:
    """Are the engine's products differences of gradients, with an error of their own?"""
    current = engine.current if isinstance(engine, Automatic) else engine
    return isinstance(current, FiniteDifference)
