"""What the tests of ``minimize`` share: problems as its arguments, and errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_penalty_bilevel import MinimizeResult, minimize, testing
from torch_penalty_bilevel.constraints import Box, Inequality

ACCURACY = 1e-6
BUDGET = 5000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


def lower_loss(problem: testing.Problem) -> Any:
    """g; for an equilibrium v = Phi(u, v) the loss |v - Phi|^2 / 2."""
    if problem.lower_loss is not None:
        return problem.lower_loss
    return lambda u, v: square(v - problem.lower_map(u, v)) / 2


def restriction(box: Any, h: Any) -> Any:
    """A level's constraints as objects of the package."""
    parts = [] if box is None else [Box(*box)]
    return (parts if h is None else [*parts, Inequality(h)]) or None


def limits(problem: testing.Problem) -> dict[str, Any]:
    return {
        "upper_constraint": restriction(problem.upper_box, problem.h_upper),
        "lower_constraint": restriction(problem.lower_box, problem.h_lower),
    }


def solve(problem: testing.Problem, start: Any, **options: Any) -> MinimizeResult:
    """From a start, or from the one of a seed."""
    start = problem.start(generator(start)) if isinstance(start, int) else start
    options = {"max_evaluations": BUDGET} | limits(problem) | options
    return minimize(problem.upper_loss, lower_loss(problem), *start, **options)


def error(problem: testing.Problem, result: MinimizeResult) -> float:
    return float(problem.error(result.upper, result.lower))


def constrained(problem: testing.Problem) -> bool:
    return any(limit is not None for limit in limits(problem).values())


FREE = [p.name for p in testing.problems() if not constrained(p)]


def quadratic_start() -> tuple[Any, Any, Tensor, Tensor]:
    return (
        lambda u, v: square(v - 1) + square(u),
        lambda u, v: square(v - 2 * u),
        vector(3.0),
        vector(0.0),
    )
