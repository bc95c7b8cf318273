"""One measurement, in a process of its own: what ran before leaves no memory and no caches behind.

An MLP h-h-10 with batches of 16 and one weight above for each of 1,000 samples, as in
``benchmarks/speed``, with Adam on both levels. The lower rate is ``RATE / h``, so that one step
changes what the network says by as much at every size. (At one rate for all, large networks
fit the 16 samples in a few steps; then H is 0, and the multiplier rule looks for it with one more
product in every step.)
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.growth import fresh
from benchmarks.speed import methods, metrics, problems
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

Row = dict[str, Any]
Step = Callable[[], object]
RATE = 0.03
WARMUP = 11  # ten steps with one more product each, and one without
LEAST_ROUNDS = 5
PLAIN, GRADIENT = "plain training", "gradient"
# Without the correction, which the rule makes up to 1e7 numbers in v and not beyond: every size
# takes the same kind of step.
ENGINES: dict[str, dict[str, Any]] = {
    "finite differences": {"curvature": "finite_difference"},
    "double backward": {"curvature": "double_backward"},
}
CORRECTED = "finite differences, corrected"
CURVES = (*ENGINES, CORRECTED)
FIRST = CURVES[0]
# glibc gives vectors of 32 MB and more back to the system when they are freed, and the system
# clears every page before it gives it again.
AS_IT_COMES, KEPT = ALLOCATORS = ("as it comes", "kept")


def in_fresh_process(what: Callable[..., Row], allocator: str, **arguments: Any) -> Row:
    """``what(**arguments)``, with one of ``ALLOCATORS``."""
    (found,) = fresh.run([partial(_with, allocator, partial(what, **arguments))])
    return found


def _with(allocator: str, measure: Callable[[], Row]) -> Row:
    if allocator == KEPT:
        fresh.keep_memory()
    return measure()


def rate(problem: problems.Problem) -> float:
    """Of the lower level."""
    first = next(m for m in problem.model.modules() if isinstance(m, nn.Linear))
    return RATE / first.in_features


def bilevel(problem: problems.Problem, curve: str) -> PenaltyBilevelOptimizer:
    """The optimizer of one of ``CURVES``."""
    options = ENGINES.get(curve, ENGINES["finite differences"])
    return PenaltyBilevelOptimizer(
        torch.optim.Adam([problem.upper], lr=methods.UPPER_LR),
        torch.optim.Adam(problem.lower, lr=rate(problem)),
        penalty=Stationarity(LeastSquares(subspace=curve == CORRECTED)),
        **options,
    )


def training(problem: problems.Problem) -> Step:
    """A step of plain training of v."""
    return methods.training(problem, lower_lr=rate(problem))


def timed(size: float, curve: str, seconds: float) -> Row:
    """CPU time, page faults and time in the system of a step, of plain training and of a gradient.

    In turn, so that all meet the same load of the machine and the same heap; plain training is of
    another copy of the network.
    """
    problem, other = problems.by_size(size), problems.by_size(size)
    optimizer = bilevel(problem, curve)
    steps: dict[str, Step] = {
        curve: lambda: optimizer.step(problem.f, problem.g),
        PLAIN: training(other),
        GRADIENT: methods.gradient(problem),
    }
    for _ in range(WARMUP):
        for step in steps.values():
            step()
    before = optimizer.metrics.gradient_evaluations
    taken = in_turn(steps, seconds)
    rounds = len(taken[curve])
    return {
        "parameters": sum(p.numel() for p in problem.lower),
        "rounds": rounds,
        "evaluations": (optimizer.metrics.gradient_evaluations - before) / rounds,
        "correction_gain": float(optimizer.metrics.correction_gain),
        "residual_norm": float(optimizer.metrics.residual_norm),
        **{name: summary(values) for name, values in taken.items()},
        "ratios": {
            name: statistics.quantiles(
                [a["cpu"] / b["cpu"] for a, b in zip(taken[curve], taken[name], strict=True)], n=4
            )
            for name in (PLAIN, GRADIENT)
        },
    }


def in_turn(steps: Mapping[str, Step], seconds: float) -> dict[str, list[dict[str, float]]]:
    """Each step's costs, round after round, for about so many seconds."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    until = time.process_time() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or (time.process_time() < until and rounds < 200):
        for name, step in steps.items():
            taken[name].append(cost(step))
        rounds += 1
    return taken


def cost(step: Step) -> dict[str, float]:
    """CPU seconds, those of them in the system, and page faults."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    step()
    cpu, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": cpu,
        "system": after.ru_stime - before.ru_stime,
        "faults": after.ru_minflt - before.ru_minflt,
    }


def summary(costs: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the quartiles of the CPU time."""
    found = {key: statistics.median(c[key] for c in costs) for key in costs[0]}
    low, _, high = statistics.quantiles([c["cpu"] for c in costs], n=4)
    return found | {"low": low, "high": high}


def held(size: float, curve: str) -> Row:
    """Peak of all tensors in later steps, and the most that was resident while ours ran alone."""

    def make() -> Step:
        problem = problems.by_size(size)
        if curve == PLAIN:
            return training(problem)
        optimizer = bilevel(problem, curve)
        return lambda: optimizer.step(problem.f, problem.g)

    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = metrics.peaks_of(make)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - empty
    count = sum(p.numel() for p in problems.by_size(size).lower)
    return {"parameters": count, **peaks, "resident_bytes": 1024 * resident}
