"""The problems: two pure losses, a start, and F(u) = f(u, v*(u)) by another way than a solver's.

All are smooth and unconstrained: constraints are what few of the solvers take. u and v are single
float64 tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.profiles import tables
from benchmarks.profiles.settled import settled
from benchmarks.suite.minimizer import lower_loss
from torch_penalty_bilevel import testing

Loss = Callable[[Tensor, Tensor], Tensor]
ANALYTIC = tuple(name for name in testing.names() if "constrained" not in testing.get(name).tags)
LEFT_OUT = tuple(name for name in testing.names() if name not in ANALYTIC)
PROBLEMS = (*ANALYTIC, *tables.TABLES)
# g above its global minimum, relative: more than L-BFGS leaves, less than other minima cost.
DEPTH = 1e-8


class Instance(NamedTuple):
    """A problem from one seed."""

    f: Loss
    g: Loss
    u: Tensor
    v: Tensor
    phi: Loss
    """Phi(u, v), whose fixed point is v*(u)."""
    worth: Loss
    """(u, v) -> F(u), 0-d; v is a hint where the lower solution is unique, and says which one is
    meant where it is not."""
    best: float | None = None
    """The least F; None: unknown."""


def instance(name: str, seed: int, data: Path) -> Instance:
    """The problem of that name.

    Raises:
        FileNotFoundError: its table is not in ``data``.
    """
    return analytic(name, seed) if name in ANALYTIC else tabular(name, seed, data)


def analytic(name: str, seed: int) -> Instance:
    """A problem of ``testing``; the seed draws the start and, where some are drawn, the data."""
    try:
        problem = testing.get(name, seed=seed)
    except TypeError:
        problem = testing.get(name)
    g = functools.partial(lower_loss, problem)
    phi = problem.lower_map or descending(g)
    chosen = "nonunique" in problem.tags

    def worth(u: Tensor, v: Tensor) -> Tensor:
        if not chosen:
            return problem.hyperobjective(u)
        # f's favourite is not v's merit: f is taken at the lower solution that v is next to.
        end, least = settled(g, u, v), g(u, problem.best_lower(u))
        solves = g(u, end) - least <= DEPTH * max(1.0, abs(float(least)))
        return problem.upper_loss(u, end) if solves else torch.tensor(math.inf)

    start = problem.start(torch.Generator().manual_seed(seed))
    return Instance(problem.upper_loss, g, *start, phi, worth, problem.optimal_value)


def tabular(name: str, seed: int, data: Path) -> Instance:
    """A problem on data; the seed draws the split."""
    table = tables.TABLES[name](seed, data)
    hint = table.v

    def worth(u: Tensor, v: Tensor) -> Tensor:
        nonlocal hint
        hint = settled(table.g, u, hint, table.unit(u), tolerance=1e-7)  # F to about 1e-6
        return table.f(u, hint)

    return Instance(table.f, table.g, table.u, table.v, descending(table.g), worth)


def descending(g: Loss) -> Loss:
    """The map of one gradient step, v - grad_v g."""

    def phi(u: Tensor, v: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(g(u, v), v, create_graph=True)
        return v - gradient

    return phi
