"""Which engine "auto" takes where torch could do with either: by bytes moved and by agreement."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from choosing import Task, Zigzag, kinked, normalised, plain
from torch import Tensor, nn

from torch_penalty_bilevel import HypergradientOptimizer, NonFiniteError, PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import Automatic, DoubleBackward
from torch_penalty_bilevel.curvature import comparison as evidence
from torch_penalty_bilevel.tensors import Pair

FIRST, PERIOD = Automatic._FIRST, Automatic._PERIOD


def test_goes_over_where_double_backward_moves_twice_the_bytes(caplog) -> None:
    task = Task(normalised()).run(FIRST - 1)
    assert not task.engine.switched
    with caplog.at_level(logging.INFO, logger="torch_penalty_bilevel"):
        task.run(1)
    assert task.engine.switched
    assert "moves" in task.engine.reason
    (record,) = caplog.records
    assert record.getMessage().startswith(f"finite_difference from evaluation {FIRST}: ")
    before = task.lower_calls
    assert task.run(1).lower_calls == before + 2  # a gradient here and one at the shifted point


def test_looks_only_where_both_products_are_wanted() -> None:
    """A lower step forms no J q, so it cannot say how far a difference of it would be off."""
    task = Task(normalised())
    for _ in range(2 * FIRST):
        task.optimizer.lower_step(task.f, task.g)
    assert not task.engine.switched
    task.optimizer.upper_step(task.f, task.g)
    assert task.engine.switched


@pytest.mark.parametrize(
    ("net", "dtype"), [(plain, torch.float32), (kinked, torch.float32), (normalised, torch.float64)]
)
def test_stays_where_it_is_cheap_or_a_difference_is_not_close(net, dtype) -> None:
    task = Task(net(), dtype).run(FIRST)
    assert not task.engine.switched


def test_stays_under_autocast() -> None:
    task = Task(normalised())
    with torch.autocast("cpu", torch.bfloat16):
        task.run(FIRST)
    assert not task.engine.switched


def test_decision_for_double_backward_is_final() -> None:
    """One look: once more for the repetition, two gradients for each relative step; later none."""
    task = Task(plain())
    assert task.run(1).lower_calls == 1
    assert task.run(FIRST - 2).lower_calls == FIRST - 1
    assert task.run(1).lower_calls == FIRST + 7
    task.engine._evaluations = PERIOD + FIRST - 1
    assert task.run(1).lower_calls == FIRST + 7 + 1


def test_a_look_changes_no_number() -> None:
    """The product is the exact one; dropout masks and v are put back."""

    def task() -> Task:
        net = normalised()
        net.insert(3, nn.Dropout(0.5))
        return Task(net)

    looked, exact = task(), task()
    exact.engine._looks = False
    for each in (looked, exact):
        torch.manual_seed(3)
        each.run(FIRST)
        each.random = torch.get_rng_state()
    assert looked.engine.switched
    assert torch.equal(looked.point(), exact.point())
    assert torch.equal(looked.random, exact.random)
    assert torch.equal(
        torch.cat([q.flatten() for q in looked.optimizer.adjoint]),
        torch.cat([q.flatten() for q in exact.optimizer.adjoint]),
    )


def test_graph_serves_further_products_after_a_look() -> None:
    """The difference moves v and back while the graph that holds it waits for the probe."""
    task = Task(normalised())
    at = Pair((task.scores,), tuple(task.net.parameters()))
    q = tuple(torch.randn_like(v) for v in at.lower)
    loss = lambda *_: task.g()  # noqa: E731
    engine = Automatic(weighs_costs=True)
    engine.linearise(loss, at).product(q)
    engine._evaluations = FIRST - 1
    linearised = engine.linearise(loss, at, reusable=True)
    products = [linearised.product(q) for _ in range(2)]
    assert engine.switched
    expected = DoubleBackward().linearise(loss, at).product(q)
    for product in products:
        for level in (0, 1):
            assert all(map(torch.equal, product[level], expected[level]))


def test_looks_again_and_returns(caplog) -> None:
    task = Task(normalised()).run(FIRST)
    assert task.engine.switched
    task.engine._evaluations = PERIOD + FIRST - 1
    with caplog.at_level(logging.INFO, logger="torch_penalty_bilevel"):
        task.run(1)
    assert task.engine.switched  # still as good
    assert not caplog.records  # which is no news
    task.engine._evaluations = 2 * PERIOD + FIRST - 1
    task.net.insert(3, Zigzag())
    task.run(1)
    assert not task.engine.switched
    assert isinstance(task.engine.current, DoubleBackward)


def test_goes_over_for_good_when_it_must_after_a_look() -> None:
    task = Task(normalised()).run(FIRST)
    task.engine._evaluations = PERIOD + FIRST - 1
    task.net[2] = nn.Hardsigmoid()  # no second derivative
    with pytest.warns(match="hardsigmoid"):
        task.run(1)
    assert task.engine.switched
    assert not task.engine._works
    assert task.run(30).engine.switched


def test_stays_where_the_closure_draws_other_data() -> None:
    task = Task(normalised())
    shifts = iter(range(1000))

    def g() -> Tensor:
        rows = torch.arange(8) + 8 * (next(shifts) % 3)
        losses = nn.functional.cross_entropy(task.net(task.x[rows]), task.y[rows], reduction="none")
        return (task.scores[rows].sigmoid() * losses).mean()

    for _ in range(FIRST):
        task.optimizer.step(task.f, g)
    assert not task.engine.switched
    assert "other data" in task.engine.reason


@pytest.mark.parametrize("steps", [0, FIRST - 1, FIRST + 2])
def test_a_failing_step_leaves_the_choice_as_it_was(steps) -> None:
    task = Task(normalised()).run(steps)
    before = task.engine.packed()
    nan = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteError):
        task.optimizer.step(task.f, lambda: task.g() * nan)  # found after the choice was made
    assert task.engine.packed() == before
    handle = task.optimizer.lower.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.run(1)  # would have gone over to differences
    handle.remove()
    assert task.engine.packed() == before
    twin = Task(normalised())
    assert torch.equal(task.run(4).point(), twin.run(steps + 4).point())


def test_zero_directions_decide_nothing() -> None:
    task = Task(normalised())
    at = Pair((task.scores,), tuple(task.net.parameters()))
    engine = Automatic(weighs_costs=True)
    zero = tuple(torch.zeros_like(v) for v in at.lower)
    for _ in range(FIRST):
        engine.linearise(lambda *_: task.g(), at).product(zero)
    assert not engine.switched
    assert engine._looks


def test_a_checkpoint_goes_on_as_if_never_stopped() -> None:
    for stop in (FIRST - 1, FIRST, FIRST + 3):
        straight = Task(normalised()).run(stop)
        other = Task(normalised(seed=5))
        with torch.no_grad():
            for mine, theirs in zip(
                (other.scores, *other.net.parameters()),
                (straight.scores, *straight.net.parameters()),
                strict=True,
            ):
                mine.copy_(theirs)
        other.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
        twin = pickle.loads(pickle.dumps(straight))
        expected = straight.run(4).point()
        assert torch.equal(other.run(4).point(), expected)
        assert torch.equal(twin.run(4).point(), expected)


def test_only_a_step_of_the_penalty_method_weighs() -> None:
    v = torch.zeros(2, requires_grad=True)
    u = torch.zeros(1, requires_grad=True)
    assert PenaltyBilevelOptimizer([u], [v]).curvature._weighs_costs
    assert not HypergradientOptimizer([u], [v]).curvature._weighs_costs


def test_self_check_compares_with_exact_products_where_a_difference_was_a_choice() -> None:
    chosen = Task(normalised()).run(FIRST).engine
    assert chosen.switched
    assert not chosen.exact().switched
    must = Automatic()
    must.switch()
    assert must.exact().switched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_64_bits_no_saving_is_enough(dtype, monkeypatch) -> None:
    found = evidence.Evidence(traffic=100.0, disagreement=1e-9, spread=1e-9)
    monkeypatch.setattr(evidence, "weigh", lambda *_: found)
    task = Task(normalised(), dtype).run(FIRST)
    assert task.engine.switched == (dtype == torch.float32)


def test_auto_takes_differences_when_it_has_gone_over() -> None:
    engine = Automatic()
    assert not engine.takes_differences
    engine.switch()
    assert engine.takes_differences
