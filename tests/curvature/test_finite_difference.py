"""The finite difference: its step, its dtypes, and closures that must give the same again."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from engines import ENGINES, TOL, products_of, relative_error
from networks import NetProblem, exact_products, net_problem
from problems import normal
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel import NondeterministicClosureError
from torch_penalty_bilevel.curvature import DoubleBackward, FiniteDifference
from torch_penalty_bilevel.tensors import Pair, filled

STEPS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@functools.cache
def rounded(net: str, dtype: torch.dtype) -> tuple[NetProblem, Pair]:
    """A network in ``dtype`` and its (J q, H q) in float64 at the same rounded point."""
    problem = net_problem(net, samples=32).cast(dtype)
    direction = tuple(d.double() for d in problem.direction())
    return problem, exact_products(problem.cast(torch.float64), direction)


def difference_error(net: str, dtype: torch.dtype, **options: Any) -> float:
    problem, truth = rounded(net, dtype)
    product = products_of(FiniteDifference(**options), problem, problem.direction())
    return relative_error((*product.upper, *product.lower), (*truth.upper, *truth.lower))


@pytest.mark.parametrize("net", ["mlp_tanh", "mlp_gelu", "cnn_groupnorm", "transformer"])
@pytest.mark.parametrize(
    ("dtype", "central", "worst"),
    # worst: what the default step reaches; measured 2e-4 to 8e-4, 2e-5 to 1.2e-4, 4e-2 to 7e-2.
    [
        (torch.float32, False, 2e-3),
        (torch.float32, True, 4e-4),
        (torch.bfloat16, True, 0.15),
    ],
)
def test_step_sits_at_the_bottom_of_the_error_curve(
    net: str, dtype: torch.dtype, central: bool, worst: float
) -> None:
    curve = [difference_error(net, dtype, relative_step=h, central=central) for h in STEPS]
    default = difference_error(net, dtype, central=central)
    best = min(curve)
    # V: rounding on the left, truncation on the right. On 16 bits both ends meet in the noise.
    assert curve[0] > 5 * best
    if dtype == torch.float32:
        assert curve[-1] > 5 * best
    assert default < 5 * best
    assert default < worst


@pytest.mark.parametrize(
    ("dtype", "central", "step"),
    [(torch.float32, False, 1e-4), (torch.float64, True, 6e-6), (torch.bfloat16, True, None)],
)
def test_default_scheme_by_dtype(dtype: torch.dtype, central: bool, step: float | None) -> None:
    """float32 takes the forward difference, 64 and 16 bits the central one."""
    calls: list[Tensor] = []
    v = torch.full((4,), 3.0, dtype=dtype, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        calls.append(v.detach().clone())
        return v.square().sum()

    engine = FiniteDifference()
    linearised = engine.linearise(closure, Pair((), (v,)))
    calls.clear()
    linearised.product((torch.full((4,), 7.0, dtype=dtype),))
    assert len(calls) == (2 if central else 1)
    assert engine.product_cost == (2 if central else 1)
    if step is not None:  # ||delta q|| = h ||v||, and v = 3 everywhere
        shift = calls[0].double() - 3
        assert_close(shift, torch.full((4,), 3 * step).double(), rtol=1e-2, atol=0)
    if central:
        assert_close(calls[0].double() - 3, 3 - calls[1].double(), rtol=1e-6, atol=0)


def test_coarsest_parameter_sets_the_step() -> None:
    """A float32 step would be rounded away in the bfloat16 parameter."""
    v = torch.ones(64, dtype=torch.float32, requires_grad=True)
    w = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    direction = (torch.ones_like(v), torch.ones_like(w))
    closure = lambda *_: v.pow(2).sum() + w.float().pow(2).sum()  # noqa: E731
    product = FiniteDifference().linearise(closure, Pair((), (v, w))).product(direction)
    # H = 2; bfloat16 carries 8 bits, so the shift and the difference are right to 10 %.
    assert_close(product.lower[0], torch.full_like(v, 2.0), rtol=0.1, atol=0)
    assert_close(product.lower[1], torch.full_like(w, 2.0), rtol=0.1, atol=0)


def test_relative_step_has_an_effect_and_is_checked() -> None:
    v = torch.ones(1, dtype=torch.float64, requires_grad=True)
    closure = lambda *_: v.pow(3).sum()  # noqa: E731
    engine = FiniteDifference(relative_step=0.1, central=False)
    _, lower = engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
    # (3 (1.1)^2 - 3) / 0.1 = 6.3 instead of 6.
    assert_close(filled(lower, (v,))[0], torch.full_like(v, 6.3))
    engine = FiniteDifference(relative_step=0.1, central=True)
    _, lower = engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
    assert_close(filled(lower, (v,))[0], torch.full_like(v, 6.0))
    for bad in (0.0, -1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="relative_step"):
            FiniteDifference(relative_step=bad)


# It leaves the parameters as they were.


@pytest.mark.parametrize("central", [True, False])
def test_parameters_are_restored_bit_equally(central: bool) -> None:
    """Subtracting the shift again leaves a few entries in a thousand an ulp off."""
    v = normal(10_000, seed=1).float().requires_grad_()
    before = v.detach().clone()
    linearised = FiniteDifference(central=central).linearise(
        lambda *_: v.pow(4).sum(), Pair((), (v,))
    )
    linearised.product((normal(10_000, seed=2).float(),))
    assert torch.equal(v, before)


def test_parameters_are_restored_when_the_shifted_evaluation_raises() -> None:
    problem = net_problem("mlp_tanh")
    linearised = FiniteDifference().linearise(problem.closure, problem.at)
    before = [v.detach().clone() for v in problem.lower]
    problem.y = problem.y[:3]
    with pytest.raises(ValueError, match="batch_size"):
        linearised.product(problem.direction())
    assert all(torch.equal(v, b) for v, b in zip(problem.lower, before, strict=True))


# What closures do besides computing a loss.


@pytest.mark.parametrize("engine", ["central", "forward"])
def test_dropout_masks_replay(engine: str) -> None:
    problem = net_problem("dropout")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        truth = products_of(DoubleBackward(), problem, problem.direction())
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        product = products_of(ENGINES[engine](), problem, problem.direction())
        # From outside one evaluation has drawn numbers, not three.
        assert torch.equal(torch.get_rng_state(), drawn)
    assert relative_error(product.lower, truth.lower) < TOL[engine]
    assert relative_error(product.upper, truth.upper) < TOL[engine]


@pytest.mark.parametrize("engine", ["forward", "central"])
def test_autocast_cache_does_not_go_stale(engine: str) -> None:
    """Inside one autocast block torch caches the bfloat16 weights and misses the shift."""
    problem = net_problem("mlp_tanh", samples=32).cast(torch.float32)
    wide = problem.cast(torch.float64)
    truth = exact_products(wide, tuple(d.double() for d in problem.direction()))
    step = FiniteDifference(relative_step=0.05, central=engine == "central")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = products_of(step, problem, problem.direction())
        after = problem.closure()
    # bfloat16 activations (8 bits) over a step of 5 %: errors of 10 %; a stale cache gives 100 %.
    assert relative_error(product.upper, truth.upper) < 0.2
    assert relative_error(product.lower, truth.lower) < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(problem.closure(), after, rtol=0, atol=0)  # the shifted copy is gone too


def test_closure_that_draws_another_batch_is_refused() -> None:
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)
    batches = iter(normal(10, 2, seed=8))
    closure = lambda *_: (v * next(batches)).square().sum()  # noqa: E731
    at = Pair((), (v,))
    with pytest.raises(NondeterministicClosureError, match="draw the batch outside the closure"):
        FiniteDifference().linearise(closure, at)
    DoubleBackward().linearise(closure, at)  # evaluates once, so the batch is one batch


def test_closure_is_checked_once() -> None:
    calls = 0
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return v.square().sum()

    engine = FiniteDifference(central=False)
    counts = []
    for _ in range(2):
        calls = 0
        engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
        counts.append(calls)
    assert counts == [3, 2]
