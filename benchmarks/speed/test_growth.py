"""How a step grows: with the batch, with lower steps, with weights of u.

With lower parameters: ``benchmarks/growth``.
"""

from functools import partial

import pytest

from benchmarks.speed import methods, metrics, problems

ENGINES = {
    "finite differences": partial(methods.penalty, curvature="finite_difference"),
    "double backward": partial(methods.penalty, curvature="double_backward"),
}
MIDDLE = 1e5
SECONDS = 0.5


@pytest.fixture
def grow(benchmark, failing_is_a_row):
    """One point of a curve: time against a plain gradient, and the peak memory of a run.

    Ten steps are for warming up: in each of them ours probe the curvature once more.
    """

    def point(against, curve, size, build, make):
        group, name = f"growth with {against}", f"{curve}, {size:.0e}"
        benchmark.group, benchmark.name = group, name
        benchmark.extra_info |= {"curve": curve, "size": size}
        with failing_is_a_row(group, name):
            race(benchmark, build(), make)
            benchmark.extra_info |= metrics.peaks_of(lambda: make(build()))

    return point


def race(benchmark, problem, make):
    """In a function of its own: what it holds is gone before the peak is measured."""
    references = {"gradient": methods.gradient(problem)}
    metrics.race(benchmark, make(problem), references, SECONDS, warmup=11)


@pytest.mark.parametrize("size", [16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("engine", [*ENGINES, "plain training"])
def test_batch(grow, engine, size):
    make = ENGINES.get(engine, methods.training)
    build = lambda: problems.by_size(MIDDLE, batch=size, samples=10_000)  # noqa: E731
    grow("batch", engine, size, build, make)


@pytest.mark.parametrize("size", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("method", [*ENGINES, "higher, unrolled"])
def test_lower_steps(grow, method, size):
    count = "lower_steps" if method in ENGINES else "steps"
    make = partial(ENGINES.get(method, methods.unrolled), **{count: size})
    build = lambda: problems.by_size(MIDDLE, batch=64)  # noqa: E731
    grow("lower steps", method, size, build, make)


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("kind", ["dense, Adam", "sparse, SparseAdam"])
def test_weights(grow, kind, size):
    """One weight per sample, 64 of them in the batch."""
    build = lambda: problems.by_samples(int(size), kind.startswith("sparse"))  # noqa: E731
    grow("weights of u", kind, size, build, methods.penalty)
