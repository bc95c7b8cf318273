"""What double backward costs against a difference, and how far the two are apart."""

from __future__ import annotations

import pytest
import torch
from choosing import Task, Zigzag, normalised
from torch import Tensor
from torch.testing import assert_close

from torch_penalty_bilevel.curvature import DoubleBackward, FiniteDifference, evidence
from torch_penalty_bilevel.randomness import RandomState
from torch_penalty_bilevel.tensors import Pair


def test_traffic_counts_what_operations_read_and_write() -> None:
    a, b = torch.ones(4, 5, dtype=torch.float32), torch.ones(5, 6, dtype=torch.float32)
    with evidence.Traffic() as traffic:
        (a @ b.T.T).sum()  # views are free
    assert traffic.bytes == 4 * (20 + 30 + 24) + 4 * (24 + 1)


@pytest.mark.parametrize("steps", [(3e-5, 1e-4, 3e-4), (3e-4, 1e-1)])
def test_evidence_against_its_definition(monkeypatch, steps) -> None:
    monkeypatch.setattr(evidence, "_STEPS", steps)
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


def test_compares_in_plain_float32_on_one_worker_only(monkeypatch) -> None:
    def at(dtype: torch.dtype) -> Pair:
        return Pair((), (torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=dtype)))

    assert evidence.is_comparable(at(torch.float32))
    assert not evidence.is_comparable(at(torch.float64))
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
    assert evidence.Evidence(2.1, 0.009).favours_differences
    assert not evidence.Evidence(1.9, 0.009).favours_differences
    assert not evidence.Evidence(2.1, 0.011).favours_differences
    assert not evidence.Evidence(2.1, float("inf")).favours_differences
