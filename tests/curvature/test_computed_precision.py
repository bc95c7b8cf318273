"""Differences whose step follows what g is computed in, where its parameters do not say so."""

from __future__ import annotations

import pytest
import torch
from choosing import Task, normalised
from torch import Tensor, nn

from benchmarks.coarse_products import KINDS, Case
from torch_penalty_bilevel import BilevelWarning
from torch_penalty_bilevel.curvature import Automatic, DoubleBackward, FiniteDifference
from torch_penalty_bilevel.curvature import autograd_graph as graph
from torch_penalty_bilevel.tensors import OptionalPair, Pair, norm

FIRST = Automatic._FIRST


class Coarse(Task):
    def f(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().f()

    def g(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().g()


def test_second_derivatives_in_16_bits_are_not_compared_with_noise() -> None:
    task = Coarse(normalised()).run(3 * FIRST)
    assert not task.engine.switched
    assert "16 bits" in task.engine.reason
    assert task.lower_calls == 3 * FIRST


def test_steps_of_differences_in_16_bits_are_not_compared_with_each_other() -> None:
    """Steps for float32, which a look tried, are below the rounding of 16 bits."""
    task = Coarse(normalised().insert(3, nn.Hardsigmoid()))  # no second derivative
    with pytest.warns(BilevelWarning) as record:
        task.run(4 * FIRST)
    assert len(record) == 1  # that it switched
    assert task.engine.in_use.relative_step is None
    assert task.engine.in_use.product_cost == 2


@pytest.fixture
def _float32():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def error(found: OptionalPair, exact: OptionalPair) -> float:
    pairs = zip((*found.upper, *found.lower), (*exact.upper, *exact.lower), strict=True)
    levels = len(found.upper)
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    parts = known[:levels], known[levels:]
    return max(float(norm([a - b for a, b in p]) / norm([b for _, b in p])) for p in parts)


@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.3), (torch.float16, 0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_under_autocast(kind: str, dtype: torch.dtype, most: float) -> None:
    """At the step for weights of that dtype, four to six times longer, the worst of the
    transformer erred by 0.8 and 0.6, of the CNN by 1 and 0.2; rounding cannot be had smaller than
    0.03 to 0.2 at any step (``python -m benchmarks.coarse_products``)."""
    case = Case(kind, 20)
    found = {}
    for name, direction in case.directions().items():
        exact = case.product(DoubleBackward(), direction)
        found[name] = error(case.product(FiniteDifference(), direction, dtype), exact)
    assert max(found.values()) < most, found


def test_weights_of_16_bits_take_longer_steps_than_finer_ones() -> None:
    """A shift of them is itself rounded."""
    engine, coarse = FiniteDifference(), torch.ones(2, dtype=torch.bfloat16)
    assert engine.usual_step((coarse,)) == 6e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.usual_step((coarse,)) == 6e-2
        assert engine.usual_step((torch.ones(2, dtype=torch.float32), coarse)) == 6e-2
        assert engine.usual_step((torch.ones(2, dtype=torch.float32),)) == 1.5e-2
    with torch.autocast("cpu", torch.float16):
        assert engine.usual_step((torch.ones(2, dtype=torch.float32),)) == 5e-3


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "_is_cuda_float32", lambda node: True)
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("allowed", [False, True])
def test_products_with_rounded_factors_are_known(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert graph.rounds_to_tf32(nn.Linear(4, 2)(x[0]).tanh().sum()) is allowed
    assert graph.rounds_to_tf32((x @ x.mT).sum()) is allowed
    assert graph.rounds_to_tf32(nn.Conv1d(3, 2, 2)(x).sum())  # by default
    assert not graph.rounds_to_tf32(x.square().sum())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not graph.rounds_to_tf32(nn.Conv1d(3, 2, 2)(x).sum())


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has the older switch"
)
def test_the_newer_switch_counts() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert graph.rounds_to_tf32(nn.Linear(4, 2)(torch.ones(4)).sum())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_over_rounded_factors_are_central_and_long(dtype: torch.dtype) -> None:
    v = torch.ones(3, dtype=dtype, requires_grad=True)
    w = torch.ones(3, 1, 3, dtype=dtype)

    def g(*_: object) -> Tensor:
        return nn.functional.conv1d(v.reshape(1, 1, 3), w).tanh().sum()

    for engine, usual in ((FiniteDifference(), 2e-3), (FiniteDifference(0.1), 2e-3)):
        engine.linearise(g, Pair((), (v,)))
        assert engine.usual_step((v,)) == (usual if dtype == torch.float32 else 6e-6)
        assert engine.product_cost == 2
    forward = FiniteDifference(central=False)
    forward.linearise(g, Pair((), (v,)))
    assert forward.product_cost == 1
    forward.renew()
    assert forward.usual_step((v,)) == (1e-4 if dtype == torch.float32 else 1e-7)
