"""One step of every method on every kind of network."""

import copy

import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import methods, metrics, problems
from torch_penalty_bilevel import LeastSquares, Stationarity


@pytest.mark.parametrize("kind", problems.BY_KIND)
def test_unit(benchmark, kind):
    """What the others are divided by: a plain gradient of g, and plain training of v."""
    benchmark.group, benchmark.name = kind, "plain training of v"
    problem = problems.by_kind(kind)
    unit = methods.gradient(problem)
    metrics.race(benchmark, methods.training(problem), {"gradient": unit}, 0.5, 3)
    benchmark.extra_info |= {
        "parameters": sum(p.numel() for p in problem.lower),
        "flops": metrics.flops(unit),
        "saved_bytes": metrics.saved_bytes(unit, problem.data),
    }
    training = metrics.peaks_of(lambda: methods.training(problems.by_kind(kind)))
    benchmark.extra_info |= training


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("kind", problems.BY_KIND)
def test_step(benchmark, kind, method, failing_is_a_row):
    benchmark.group, benchmark.name = kind, method
    make = methods.METHODS[method]
    with failing_is_a_row(kind, method):
        problem = problems.by_kind(kind)
        step = make(problem)
        step()
    references = {"gradient": methods.gradient(problem)}
    if method == methods.OURS and kind.startswith("MLP"):
        references["floor"] = methods.METHODS[methods.FLOOR](problems.by_kind(kind))
    ours = "penalty" in method or method == methods.FLOOR
    # Ours probe the curvature in every one of the first ten steps.
    metrics.race(benchmark, step, references, 1.0 if ours else 0.6, 12 if ours else 1)
    benchmark.extra_info["flops"] = metrics.flops(step, metrics.PERIOD if ours else 1)
    benchmark.extra_info |= metrics.peaks_of(lambda: make(problems.by_kind(kind)))
    if "torchopt" not in method:  # torch.func refuses the hooks that see saved tensors
        benchmark.extra_info["saved_bytes"] = metrics.saved_bytes(step, problem.data)


@pytest.mark.parametrize("kind", [k for k in problems.BY_KIND if k.startswith("MLP 64")])
def test_floor_takes_the_same_steps(kind):
    """Else a ratio to it would compare different mathematics; float64 leaves rounding only."""
    torch.set_default_dtype(torch.float64)
    try:
        by_hand = problems.by_kind(kind)
        ours = copy.deepcopy(by_hand)
        rule = Stationarity(LeastSquares(subspace=False))
        steps = methods.METHODS[methods.FLOOR](by_hand), methods.penalty(ours, penalty=rule)
        for _ in range(60):
            for step in steps:
                step()
        pairs = zip((ours.upper, *ours.lower), (by_hand.upper, *by_hand.lower), strict=True)
        for mine, theirs in pairs:
            assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)
