"""The methods of ``race.py`` by their names in the tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.race.problem import Grid, Method
from examples.shared.solvers import (
    Solver,
    conjugate_gradients,
    hypergradient,
    implicit,
    neumann,
    penalty,
    unrolled,
)


def methods_of(
    grid: Grid, ridge: float | None = None, damping: float | None = None, curvature: str = "auto"
) -> dict[str, Method]:
    """By their names in the tables.

    Args:
        grid: of the problem.
        ridge: added to H by torchopt's conjugate gradients.
        damping: by ours.
        curvature: of our optimizers.
    """

    def method(start: Callable[..., Solver], group: str, **options: Any) -> Method:
        return Method(partial(start, **options), group, grid.lower_steps, grid.lower)

    def ours(start: Callable[..., Solver], group: str, **options: Any) -> Method:
        return method(start, group, **({"curvature": curvature} | options))

    def by_cg(iterations: int) -> Method:
        solve = partial(conjugate_gradients, iterations=iterations, ridge=ridge)
        return method(implicit, "peer", solve=solve)

    reference = "ours (reference)"
    cg = {"method": "cg", "inner_iterations": 10, "damping": damping}
    return {
        "penalty (default)": ours(penalty, "ours"),
        "penalty, value gap": ours(penalty, "ours", penalty="value", curvature="finite_difference"),
        "Hypergradient, CG 10": ours(hypergradient, reference, **cg),
        "Hypergradient, reverse": ours(hypergradient, reference, method="reverse")._replace(
            lower=grid.gradient
        ),
        "Hypergradient, one step": ours(hypergradient, reference, method="one_step"),
        "torchopt CG 5": by_cg(5),
        "torchopt CG 20": by_cg(20),
        "torchopt Neumann 10": method(implicit, "peer", solve=neumann),
    } | {
        f"higher unrolled {steps}": method(unrolled, "peer")._replace(lower_steps=(steps,))
        for steps in sorted(grid.lower_steps)
    }
