"""What a test problem is: two pure losses, and everything that is known about their solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Map: TypeAlias = Callable[[Tensor], Tensor]
Point: TypeAlias = tuple[Tensor, Tensor]
Bounds: TypeAlias = tuple[float, float]

TAGS = {
    "nonsingular": "d2g/dv2 is invertible at v*(u), for all u but isolated points",
    "singular": "d2g/dv2 is not invertible at v*(u): the implicit function theorem says nothing",
    "nonunique": "for some u several v minimise g; v*(u) is the one f likes best (optimistic)",
    "nonconvex": "g(u, .) is not convex",
    "discontinuous": "u -> f(u, v*(u)) jumps",
    "many_solutions": "more than one (u, v) is optimal",
    "unattained": "the optimal value is approached, never reached",
    "constrained": "a box or an inequality on u or v",
    "minimax": "g = -f",
    "fixed_point": "the lower level is v = Phi(u, v) instead of a minimisation",
    "synthetic": "from the experiments of Mehra & Hamm (2021)",
    "library": "from a published collection of small bilevel problems",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    r"""A bilevel problem with a known solution.

    .. math::
        \min_{u \in U} f(u, v) \quad\text{where}\quad v \in \arg\min_{v \in V(u)} g(u, v)

    u and v are vectors, float64, on the CPU; f and g are pure, 0-d and twice differentiable.
    Where several v minimise g the problem is meant optimistically: f chooses.

    Attributes:
        name: what ``get`` looks up.
        title: a line for tables.
        source: where the problem is from.
        traps: what goes wrong here with careless methods.
        tags: see ``TAGS``.
        upper_loss: f(u, v).
        lower_loss: g(u, v); None for a fixed-point problem.
        lower_map: Phi(u, v), shaped like v, for a fixed-point problem.
        start: draws (u, v), u in ``upper_box`` and v in ``lower_box``.
        best_lower: v*(u), a global minimiser of g(u, .), the optimistic one.
        exact_hypergradient: d/du f(u, v*(u)) where it exists (not at kinks and jumps); None where
            the Hessian of g at v*(u) is singular.
        optimal_value: the least f over all feasible (u, v*(u)).
        solutions: all (u, v) that reach it; one of them where they form a continuum; none where
            the value is not attained.
        distance: Euclidean distance to the solutions where they form a continuum.
        published_error: the (absolute) error measure of the source, where it has one of its own.
        kappa: the condition number the problem was built with, where it is a choice.
        upper_box: low <= u <= high, elementwise.
        lower_box: low <= v <= high, elementwise.
        h_upper: a vector h(u, v), all entries <= 0 wanted; constrains the upper level.
        h_lower: the same for the lower level, V(u) = {v: h_lower(u, v) <= 0, v in lower_box}.

    Example:
        >>> from torch_penalty_bilevel import testing
        >>> problem = testing.get("scalar_ridge")
        >>> u, v = problem.solution()
        >>> float(u.exp().round()), bool(problem.error(u, v) < 1e-12)
        (5.0, True)
        >>> round(float(problem.best_lower(u)), 4), problem.optimal_value
        (0.6667, 0.0)
    """

    name: str
    title: str
    source: str
    traps: str
    tags: frozenset[str]
    upper_loss: Loss
    start: Callable[[Generator], Point]
    best_lower: Map
    optimal_value: float
    lower_loss: Loss | None = None
    lower_map: Loss | None = None
    exact_hypergradient: Map | None = None
    solutions: tuple[Point, ...] = ()
    distance: Loss | None = None
    published_error: Loss | None = None
    kappa: float | None = None
    upper_box: Bounds | None = None
    lower_box: Bounds | None = None
    h_upper: Loss | None = None
    h_lower: Loss | None = None

    def __post_init__(self) -> None:
        unknown = self.tags - TAGS.keys()
        if unknown:
            raise ValueError(f"unknown tags {sorted(unknown)}; known ones are {sorted(TAGS)}")
        if (self.lower_loss is None) == (self.lower_map is None):
            raise ValueError(f"{self.name}: give either lower_loss or lower_map")
        if self.distance is None and not self.solutions:
            raise ValueError(f"{self.name}: without solutions there must be a distance")

    def solution(self) -> Point:
        """The solution (u, v), where there is exactly one.

        Raises:
            ValueError: there are several, or none is attained.
        """
        if self.tags & {"many_solutions", "unattained"}:
            raise ValueError(f"{self.name} has no unique solution; use .solutions or .error(u, v)")
        return self.solutions[0]

    def hyperobjective(self, u: Tensor) -> Tensor:
        """f(u, v*(u)), 0-d."""
        return self.upper_loss(u, self.best_lower(u))

    def error(self, u: Tensor, v: Tensor) -> Tensor:
        """Distance of (u, v) to the nearest solution (u*, v*), over max(1, ||(u*, v*)||_2); 0-d."""
        if self.distance is not None:
            size = max(1.0, *(norm(*s) for s in self.solutions)) if self.solutions else 1.0
            return self.distance(u, v) / size
        gaps = [apart(u, v, *s) / max(1.0, norm(*s)) for s in self.solutions]
        return torch.stack(gaps).min()


def apart(u: Tensor, v: Tensor, other_u: Tensor, other_v: Tensor) -> Tensor:
    """Euclidean distance of two points of the joint space, 0-d."""
    return ((u - other_u).square().sum() + (v - other_v).square().sum()).sqrt()


def norm(u: Tensor, v: Tensor) -> float:
    """Euclidean norm of a point of the joint space."""
    return math.hypot(float(torch.linalg.vector_norm(u)), float(torch.linalg.vector_norm(v)))
