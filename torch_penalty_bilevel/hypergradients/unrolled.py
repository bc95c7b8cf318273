"""Reverse mode through lower gradient steps, with recomputation: only iterates are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import OptionalTensors, Tensors, add, cast_like, clones, scale, sum_of_optional
from ..undo.random_state import RandomState
from ..undo.repeats import check_repeats
from .problem import LocalProblem

_NEEDS_REPETITION = (
    "Reverse mode repeats lower steps on the same data: draw batches by torch's, numpy's or "
    "Python's global random generator inside the closure, or outside of it for the whole step"
)


class Visit(NamedTuple):
    """A lower step v_{t+1} = v_t - eta r(u, v_t), as much of it as repeating it takes."""

    lower: Tensors
    """v_t, by value."""
    step_sizes: tuple[float, ...]
    """eta of each tensor."""
    loss: Tensor
    """g(u, v_t), or ||r||^2 / 2: a closure that draws other data when repeated gives another."""
    random: RandomState | None
    """Of the closure, before it was called; None for a pure function."""

    def check_step(self, after: Tensors, residual: Tensors) -> None:
        """Raise ``ValueError`` unless a rule moved v_t to v_t - eta r."""
        steps = zip(self.lower, self.step_sizes, residual, after, strict=True)
        for before, eta, r, v in steps:
            expected = before - eta * r.to(before.dtype)
            slack = 8 * torch.finfo(v.dtype).eps * (before.abs() + expected.abs())
            if not bool(((v.detach() - expected).abs() <= slack).all()):
                raise ValueError(
                    'method="reverse" goes back through v <- v - lr r, but the lower rule moved v '
                    "otherwise; use torch.optim.SGD without momentum or hooks that change gradients"
                )


def descend(problem: LocalProblem, steps: int, step_size: float) -> tuple[list[Visit], Tensors]:
    """The visits of ``steps`` lower steps from ``problem.at``, and v_T."""
    visits: list[Visit] = []
    here = problem.at.lower
    for _ in range(steps):
        with problem.lower_at(here):
            loss, residual = problem.residual()
        visits.append(Visit(here, (step_size,) * len(here), loss, None))
        here = add(here, cast_like(scale(residual, -step_size), here))
    return visits, clones(here)


def pull_back(
    problem: LocalProblem, visits: Sequence[Visit], slope: Tensors
) -> tuple[OptionalTensors, Tensors]:
    r"""The derivative of f(u, v_T) through the steps, and the adjoint that it stands for.

    .. math::
        a_T = \nabla_v f, \quad a_t = (I - \eta A(v_t)) a_{t+1}, \quad
        p = -\eta \sum_t (\partial r/\partial u)^T a_{t+1}, \quad q = -\eta \sum_t a_{t+1}

    One graph lives at a time: memory is that of the visits, however many. If v_t is v* for all of
    them, q is the Neumann series of the adjoint equation and p = (dr/du)'q. Source: Franceschi et
    al. (2017), Algorithm 1; fewer visits than steps were taken is the truncation of
    Shaban et al. (2019).

    Args:
        problem: the losses.
        visits: the last steps, in the order they were taken.
        slope: grad_v f at v_T.

    Returns:
        (p, q).

    Raises:
        NondeterministicClosureError: the lower closure returned something else when repeated.
    """
    indirect: OptionalTensors = (None,) * len(problem.at.upper)
    carried, adjoint = slope, scale(slope, 0.0)
    for visit in reversed(visits):
        random = contextlib.nullcontext() if visit.random is None else visit.random.replayed()
        with problem.lower_at(visit.lower), random:
            linear = problem.linearise()
            check_repeats(visit.loss, linear.loss, _NEEDS_REPETITION)
            step = tuple(-eta * a for eta, a in zip(visit.step_sizes, carried, strict=True))
            through_upper, change = linear.both(step)
        indirect = sum_of_optional(indirect, through_upper)
        carried, adjoint = add(carried, change), add(adjoint, step)
    return indirect, adjoint
