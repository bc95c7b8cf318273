"""Solvers of a bilevel problem: every one makes an upper step at a call, v along the way.

This package's optimizers, and their peers: torchopt's implicit differentiation and higher's
unrolling, which are imported when they are asked for.

Letters: u the upper and v the lower variables, f and g the losses.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.shared.task import Rates, Step, Task, Values
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

NEUMANN_STEP = 0.1  # where the problem knows none


class Solver(NamedTuple):
    """A step, and what a checkpoint needs beside the parameters of both levels."""

    step: Step
    rules: tuple[torch.optim.Optimizer, ...]


def anneal(rules: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Every rate falls along a cosine: as it was at share 0 of a run, 0 at share 1.

    torch's schedulers would complain of a rule whose ``step`` is not called, which is how higher
    takes its rule for v.
    """
    for rule in rules:
        for group in rule.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (
                0.5 + 0.5 * math.cos(math.pi * share)
            )


def library(name: str) -> Any:
    """A peer, without the warnings of its import.

    Raises:
        SystemExit: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f"{name} is not installed: pip install {name}") from error


def penalty(task: Task, rates: Rates, **options: Any) -> Solver:
    """This optimizer, every lower step on a batch of its own."""
    optimizer = PenaltyBilevelOptimizer(
        task.upper,
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        upper_constraint=task.upper_constraint,
        allow_unused=task.is_new,  # while the upper level is held
        **options,
    )
    ready = not task.is_new

    def step() -> None:
        nonlocal ready
        task.begin()
        if task.is_new:
            optimizer.restart_lower()
        if ready:  # the very first evaluation looks at what the losses depend on
            with task.held_upper():
                for _ in range(rates.lower_steps - 1):
                    task.draw()
                    optimizer.lower_step(task.upper_loss, task.lower_loss)
        task.draw()
        optimizer.step(task.upper_loss, task.lower_loss)
        ready = True

    return Solver(step, (optimizer,))


def hypergradient(task: Task, rates: Rates, **options: Any) -> Solver:
    """This package's reference implementations; the closures draw, see its documentation."""
    if options["method"] == "reverse":
        rates = rates._replace(lower=rates.lower * task.gradient_unit)
    elif options["method"] == "one_step":
        options["step_size"] = task.adjoint_step
    optimizer = HypergradientOptimizer(
        task.upper,
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        lower_steps=rates.lower_steps,
        warm_start="lower" if task.is_new else True,  # an adjoint of other tasks is no start
        upper_constraint=task.upper_constraint,
        **options,
    )

    def lower_loss() -> Tensor:
        task.draw()
        return task.lower_loss()

    def step() -> None:
        task.begin()
        optimizer.step(task.upper_loss, lower_loss)

    return Solver(step, (optimizer,))


def implicit(task: Task, rates: Rates, solve: Callable[[Task], Callable[..., Any]]) -> Solver:
    """Implicit differentiation of Adam steps by torchopt's functional interface.

    Args:
        task: the run.
        rates: of Adam on both levels.
        solve: makes the linear solver for a task, ``conjugate_gradients`` or ``neumann``.
    """
    torchopt = library("torchopt")
    upper_rule = torch.optim.Adam(task.upper, lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)
    batch: Any = None

    def loss(values: Values, upper: Values) -> Tensor:
        return task.lower_loss(values, upper, batch)

    @torchopt.diff.implicit.custom_root(torch.func.grad(loss), argnums=1, solve=solve(task))
    def solution(start: Values, upper: Values) -> Values:
        held = tuple(p.detach() for p in upper)
        with task.held_upper():
            for _ in range(rates.lower_steps):
                task.draw()
                lower_rule.zero_grad()
                with torch.enable_grad():
                    task.lower_loss(u=held).backward()
                lower_rule.step()
        return tuple(p.detach().clone().requires_grad_() for p in task.lower)

    def step() -> None:
        nonlocal batch
        task.begin()
        batch = task.draw()
        values = solution(tuple(task.lower), tuple(task.upper))
        upper_rule.zero_grad()
        task.upper_loss(values).backward()
        upper_rule.step()
        keep_in(task)

    return Solver(step, (upper_rule, lower_rule))


@torch.no_grad()
def keep_in(task: Task) -> None:
    """Put u back into its set."""
    if task.upper_constraint is not None:
        for p in task.upper:
            p.clamp_(task.upper_constraint.low, task.upper_constraint.high)


def unrolled(task: Task, rates: Rates) -> Solver:
    """higher: differentiate through the lower Adam steps, which go on where they ended."""
    higher = library("higher")
    upper_rule = torch.optim.Adam(task.upper, lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)

    def step() -> None:
        task.begin()
        with (
            task.held_upper(graph=True),
            higher.innerloop_ctx(task.module, lower_rule) as (copy, inner),
        ):
            for _ in range(rates.lower_steps):
                task.draw()
                inner.step(task.lower_loss(tuple(copy.parameters())))
            last = tuple(copy.parameters())
            gradients = torch.autograd.grad(task.upper_loss(last), task.upper)
            for p, gradient in zip(task.upper, gradients, strict=True):
                p.grad = gradient
            upper_rule.step()
            keep_in(task)
            with torch.no_grad():  # higher leaves the copying back to its users
                for index, (kept, moved) in enumerate(zip(task.lower, last, strict=True)):
                    kept.copy_(moved)
                    lower_rule.state[kept] = {
                        name: value.detach() if isinstance(value, Tensor) else value
                        for name, value in inner.state[0][index].items()
                    }

    return Solver(step, (upper_rule, lower_rule))


def conjugate_gradients(task: Task, iterations: int, ridge: float | None = None) -> Any:
    """torchopt's, on (H + ridge) q = -grad_v f."""
    return library("torchopt").linear_solve.solve_cg(maxiter=iterations, ridge=ridge)


def neumann(task: Task) -> Any:
    """Torchopt's ten terms of the Neumann series."""
    alpha = task.adjoint_step or NEUMANN_STEP
    return library("torchopt").linear_solve.solve_inv(ns=True, maxiter=10, alpha=alpha)
