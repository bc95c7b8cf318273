"""What double backward costs against a difference, and how far the two are apart."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from choosing import Task, Zigzag, normalised
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.curvature import DoubleBackward, FiniteDifference
from torch_penalty_bilevel.curvature import comparison as evidence
from torch_penalty_bilevel.tensors import OptionalPair, Pair
from torch_penalty_bilevel.undo.random_state import RandomState


def test_traffic_counts_what_operations_read_and_write() -> None:
    a, b = torch.ones(4, 5, dtype=torch.float32), torch.ones(5, 6, dtype=torch.float32)
    with evidence.Traffic() as traffic:
        (a @ b.T.T).sum()  # views are free
    assert traffic.bytes == 4 * (20 + 30 + 24) + 4 * (24 + 1)


@pytest.mark.parametrize("times", [(0.3, 1.0, 3.0), (3.0, 1e3)])
def test_evidence_against_its_definition(monkeypatch, times) -> None:
    monkeypatch.setattr(evidence, "_TIMES", times)
    steps = [x * 1e-4 for x in times]
    task = Task(normalised())
    at = Pair((task.scores,), tuple(task.net.parameters()))
    q = tuple(torch.randn_like(v) for v in at.lower)
    loss = lambda *_: task.g()  # noqa: E731
    exact = DoubleBackward().linearise(loss, at).product(q)
    differences = FiniteDifference()
    others = [FiniteDifference(h).linearise(loss, at).product(q) for h in steps]
    with evidence.Traffic() as one_gradient:
        torch.autograd.grad(task.g(), (*at.upper, *at.lower))
    found = evidence.weigh(differences, loss, at, q, exact, 1000, RandomState())

    def error(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
        gap = torch.cat([(a - b).flatten() for a, b in zip(x, y, strict=True)])
        return float(gap.norm() / torch.cat([b.flatten() for b in y]).norm())

    errors = [max(map(error, other, exact)) for other in others]
    assert_close(found.disagreement, min(errors), rtol=1e-5, atol=0)
    pairs = itertools.pairwise(others)
    spread = min(max(map(error, small, large)) for small, large in pairs)
    assert_close(found.spread, spread, rtol=1e-5, atol=0)
    assert differences.relative_step == steps[errors.index(min(errors))]
    # The difference's own arithmetic on v (shifting, subtracting) comes on top of a gradient.
    assert 1000 / (2 * one_gradient.bytes) > found.traffic > 1000 / (4 * one_gradient.bytes)


@pytest.mark.parametrize("curved", ["upper", "lower"])
def test_disagreement_is_the_larger_of_both_products(curved) -> None:
    """g = u v + v^2 + a zigzag of u v (J jumps) or of v alone (only H does)."""
    u, v = (torch.full((4,), x, dtype=torch.float32, requires_grad=True) for x in (1.0, 2.0))
    zigzag = Zigzag()

    def loss(*_: object) -> Tensor:
        jumping = zigzag(u * v) if curved == "upper" else zigzag(v)
        return (u * v + v.square() + 0.01 * jumping).sum()

    at, q = Pair((u,), (v,)), (torch.linspace(-1, 1, 4, dtype=torch.float32),)
    exact = DoubleBackward().linearise(loss, at).product(q)
    found = evidence.weigh(FiniteDifference(), loss, at, q, exact, 1, RandomState())
    assert found.disagreement > 0.01


def test_compares_in_plain_32_or_64_bits_on_one_worker_only(monkeypatch) -> None:
    def at(dtype: torch.dtype) -> Pair:
        return Pair((), (torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=dtype)))

    assert evidence.is_comparable(at(torch.float32))
    assert evidence.is_comparable(at(torch.float64))
    assert not evidence.is_comparable(at(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not evidence.is_comparable(at(torch.float32))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not evidence.is_comparable(at(torch.float32))


@pytest.mark.parametrize(
    ("found", "exact", "error"),
    [(1.1, 1.0, 0.1), (0.0, 0.0, 0.0), (1.0, 0.0, float("inf")), (float("nan"), 1, float("inf"))],
)
def test_error_is_relative_and_never_nan(found, exact, error) -> None:
    pair = ((torch.tensor([found]), None), (torch.tensor([float(exact)]), None))
    assert_close(evidence._error(*pair), error, rtol=1e-6, atol=0)


def test_either_reason_alone_does_not_do() -> None:
    assert evidence.Evidence(2.1, 0.009, 0.1).favours_differences
    assert not evidence.Evidence(1.9, 0.009, 0.1).favours_differences
    assert not evidence.Evidence(2.1, 0.011, 0.1).favours_differences
    assert not evidence.Evidence(2.1, float("inf"), 0.1).favours_differences


@pytest.mark.parametrize(
    ("disagreement", "spread", "refutes"),
    [(0.2, 0.019, True), (0.2, 0.021, False), (0.04, 1e-6, False), (math.inf, math.inf, False)],
)
def test_only_differences_that_agree_among_themselves_refute(disagreement, spread, refutes):
    assert evidence.Evidence(1.0, disagreement, spread).refutes_double_backward == refutes


def test_a_wrong_second_derivative_is_refuted_with_the_steadiest_step() -> None:
    """g = exp(v) whose "exact" product is 30 % off; the error of a difference grows with h."""
    v = torch.ones(4, dtype=torch.float64, requires_grad=True)
    at, q = Pair((), (v,)), (torch.ones(4, dtype=torch.float64),)
    loss = lambda *_: v.exp().sum()  # noqa: E731
    wrong = OptionalPair((), (0.7 * v.detach().exp(),))
    differences = FiniteDifference()
    found = evidence.weigh(differences, loss, at, q, wrong, 1, RandomState())
    assert found.refutes_double_backward
    assert_close(found.disagreement, 3 / 7, rtol=1e-6, atol=0)
    product = differences.linearise(loss, at).product(q).lower[0]
    assert_close(product, v.detach().exp(), rtol=1e-8, atol=0)


def test_steps_are_steadied_on_a_smooth_loss_and_not_across_kinks() -> None:
    """g' of the zigzag jumps by 2 every thousandth, so a difference depends on where it ends."""
    v = torch.linspace(0.5, 1.5, 200, dtype=torch.float32, requires_grad=True)
    at, q = Pair((), (v,)), (torch.ones(200, dtype=torch.float32),)
    differences, random, zigzag = FiniteDifference(), RandomState(), Zigzag()
    assert evidence.steadied(differences, lambda *_: v.pow(4).sum(), at, q, random) < 1e-2
    product = differences.linearise(lambda *_: v.pow(4).sum(), at).product(q).lower[0]
    assert_close(product, 12 * v.detach() ** 2, rtol=5e-3, atol=0)
    assert evidence.steadied(differences, lambda *_: zigzag(v).sum(), at, q, random) > 0.1
