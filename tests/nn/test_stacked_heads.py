"""Heads of tasks against ``nn.Linear`` one by one, and the published cosine in closed form."""

import copy
import pickle

import pytest
import torch
from blocks import check_hypergradient, every_engine
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel.nn import StackedHeads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_head_is_a_linear_layer(bias, dtype):
    heads = StackedHeads(3, 5, 4, bias=bias, dtype=dtype)
    x, probe = torch.randn(3, 7, 5, dtype=dtype), torch.randn(3, 7, 4, dtype=dtype)
    (heads(x) * probe).sum().backward()
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for t in range(3):
        linear = nn.Linear(5, 4, bias=bias, dtype=dtype)
        state = {name: p[t] for name, p in heads.state_dict().items()}
        linear.load_state_dict(state)
        torch.testing.assert_close(heads(x)[t], linear(x[t]), **tolerance)
        (linear(x[t]) * probe[t]).sum().backward()
        for name, p in linear.named_parameters():
            torch.testing.assert_close(heads.get_parameter(name).grad[t], p.grad, **tolerance)


def test_the_cosine_in_closed_form():
    heads = StackedHeads(2, 5, 3, cosine=True, scale=7.0, augmentation=0.2)
    nn.init.normal_(heads.weight)
    nn.init.normal_(heads.bias)
    x = torch.randn(2, 4, 5)
    for t in range(2):
        rows = torch.cat([x[t], torch.full((4, 1), 0.2)], 1)
        columns = torch.cat([heads.weight[t], heads.bias[t][:, None]], 1)
        wanted = 7 * F.cosine_similarity(rows[:, None], columns[None], dim=2)
        torch.testing.assert_close(heads(x)[t], wanted)
    published = StackedHeads(2, 5, 3, cosine=True)
    assert (published.scale, published.augmentation) == (10.0, 1e-3)
    assert bool(published(torch.zeros(2, 1, 5)).isfinite().all())


@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_of_tasks_do_not_meet(cosine):
    heads, x = StackedHeads(3, 5, 4, cosine=cosine), torch.randn(3, 7, 5, requires_grad=True)
    for t in range(3):
        slopes = torch.autograd.grad(heads(x)[t].square().sum(), [heads.weight, heads.bias, x])
        for slope in slopes:
            others = [s for s in range(3) if s != t]
            assert float(slope[others].abs().max()) == 0
            assert float(slope[t].abs().max()) > 0


def test_reset_draws_as_torch_does_and_as_published():
    heads = StackedHeads(40, 25, 30)
    kept = heads.weight
    before = kept.detach().clone()
    heads.reset()
    assert heads.weight is kept
    assert not torch.equal(kept, before)
    # Uniform in +-1/5, as nn.Linear(25, 30): standard deviation 0.2 / sqrt(3).
    for parameter in heads.parameters():
        assert 0.19 < float(parameter.detach().abs().max()) <= 0.2
        assert abs(float(parameter.detach().std()) - 0.2 / 3**0.5) < 0.005
    assert float(nn.Linear(25, 30).weight.detach().abs().max()) <= 0.2
    cosine = StackedHeads(40, 25, 30, cosine=True)
    assert abs(float(cosine.weight.detach().std()) - 0.01) < 2e-4
    assert torch.equal(cosine.bias, torch.full((40, 30), 1e-3))
    assert [*StackedHeads(2, 3, 4, bias=False).state_dict()] == ["weight"]


@every_engine
@pytest.mark.parametrize("bias", [True, False])
def test_hypergradient_of_shared_features_in_the_optimizer(engine, bias):
    """Heads below, a representation above: in the optimizer as with dense Hessians."""
    x, y = torch.randn(2, 8, 3), torch.randint(2, (16,))
    features = nn.Linear(3, 2)
    heads = StackedHeads(2, 2, 2, bias=bias)
    squares = lambda: sum(p.square().sum() for p in heads.parameters())  # noqa: E731
    scores = lambda part: heads(features(x)[:, part]).flatten(0, 1)  # noqa: E731
    labels = y.reshape(2, 8)
    check_hypergradient(
        features.parameters(),
        heads.parameters(),
        lambda: F.cross_entropy(scores(slice(4)), labels[:, :4].flatten()),
        lambda: F.cross_entropy(scores(slice(4, 8)), labels[:, 4:].flatten()) + 0.3 * squares(),
        engine,
        lr=0.8,
    )


@every_engine
def test_hypergradient_below_cosine_heads(engine):
    x, y = torch.randn(2, 4, 3), torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]])
    features = nn.Linear(3, 2)
    heads = StackedHeads(2, 2, 2, cosine=True, scale=2.0, augmentation=0.5)
    scores = lambda part: heads(features(x)[:, part]).flatten(0, 1)  # noqa: E731
    # Held near ones: the cosine alone does not see the length of (W_k, b_k).
    away = lambda: sum((p - 1).square().sum() for p in heads.parameters())  # noqa: E731
    with torch.no_grad():
        heads.weight.fill_(1.0)
    check_hypergradient(
        features.parameters(),
        heads.parameters(),
        lambda: F.cross_entropy(scores(slice(2)), y[:, :2].flatten()),
        lambda: F.cross_entropy(scores(slice(1, 4)), y[:, 1:].flatten()) + 0.3 * away(),
        engine,
        lr=0.8,
    )


def test_a_cosine_row_of_zeros_scores_zero_and_leaves_the_others_alone():
    heads, x = StackedHeads(2, 3, 4, cosine=True), torch.randn(2, 5, 3, requires_grad=True)
    before = heads(x).detach()
    with torch.no_grad():
        heads.weight[1, 2].zero_()
        heads.bias[1, 2].zero_()
    scores = heads(x)
    wanted = before.clone()
    wanted[1, :, 2] = 0
    torch.testing.assert_close(scores, wanted)
    inputs = (x, heads.weight, heads.bias)
    first = torch.autograd.grad(scores.square().sum() + scores.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
    for t in (*first, *second):
        assert bool(t.isfinite().all())
    assert torch.equal(first[1][1, 2], torch.zeros(3))
    assert float(first[1].detach().abs().sum(2).gt(0).sum()) == 7


def test_copies_and_checkpoints():
    heads, x = StackedHeads(2, 3, 4), torch.randn(2, 5, 3)
    other = StackedHeads(2, 3, 4)
    other.load_state_dict(heads.state_dict())
    for twin in (other, copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert torch.equal(twin(x), heads(x))
    assert "2, 3, 4, bias=True, cosine=False" in repr(heads)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StackedHeads(0, 3, 4), "tasks must be an integer >= 1, got 0"),
        (lambda: StackedHeads(2, 3.0, 4), "in_features must be an integer"),
        (lambda: StackedHeads(2, 3, 4, bias=False, cosine=True), "cosine=True needs bias=True"),
        (lambda: StackedHeads(2, 3, 4, scale=0), "scale must be a finite number > 0, got 0"),
        (lambda: StackedHeads(2, 3, 4, augmentation=-1.0), "augmentation must be"),
        (
            lambda: StackedHeads(2, 3, 4)(torch.ones(5, 3)),
            r"\(tasks, n, in_features\) = \(2, n, 3\), got \(5, 3\); .* x.expand\(2, -1, -1\)",
        ),
        (lambda: StackedHeads(2, 3, 4)(torch.ones(1, 5, 3)), r"got \(1, 5, 3\)"),
    ],
)
def test_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
