"""What a set that a level's parameters stay in must offer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .faces import Face


class Projection(Protocol):
    """A closed convex set with a Euclidean projection.

    ``PenaltyBilevelOptimizer`` asks for ``project`` and ``face``; ``minimize`` for ``values`` and,
    where the set lies in a plane, for coordinates of it (subclass this for the default: none).
    """

    def project(self, point: Tensor) -> Tensor:
        """The nearest point of the set; a point of the set comes back bit-equal."""
        ...

    def face(self, point: Tensor, gradient: Tensor) -> Face:
        """The critical face at ``point``."""
        ...

    def values(self, point: Tensor) -> Tensor:
        """H(x), one vector, <= 0 in the set and differentiable."""
        ...

    def free(self, point: Tensor) -> Tensor:
        """Coordinates of a point, in which no equation is left; by default the point."""
        return point

    def inside(self, coordinates: Tensor) -> Tensor:
        """The point with these coordinates."""
        return coordinates

    def direction(self, coordinates: Tensor) -> Tensor:
        """The direction with these coordinates."""
        return coordinates
