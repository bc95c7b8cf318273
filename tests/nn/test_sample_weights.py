"""Weights of samples, dense and sparse, against closed forms and each other."""

import copy
import math
import pickle

import pytest
import torch
from blocks import check_hypergradient, every_engine
from torch.nn import functional as F

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SampleWeights


def test_weights_are_the_published_ones_of_half_the_logits():
    weights = SampleWeights(5)
    a = torch.linspace(-3, 3, 5)
    with torch.no_grad():
        weights.logits.copy_(2 * a)
    torch.testing.assert_close(weights(), (a.tanh() + 1) / 2)
    index = torch.tensor([[4, 0], [1, 4]])
    torch.testing.assert_close(weights(index), ((a.tanh() + 1) / 2)[index])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_initial_weights_come_back(sparse, dtype):
    given = torch.tensor([0.1, 0.5, 0.99])
    weights = SampleWeights(3, given, sparse=sparse, dtype=dtype)
    assert weights.logits.dtype == dtype
    assert weights.logits.shape == (3,)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights().double(), given, rtol=tolerance, atol=0)
    picked = weights(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(picked.double(), given[[2, 0, 2]], rtol=tolerance, atol=0)
    assert [p.shape for p in SampleWeights(4, 0.25).parameters()] == [(4,)]
    torch.testing.assert_close(SampleWeights(4, 0.25)(), torch.full((4,), 0.25))


@pytest.mark.parametrize("sparse", [False, True])
def test_weighted_mean_in_closed_form(sparse):
    given = torch.tensor([0.2, 0.4, 0.6, 0.8])
    weights, index = SampleWeights(4, given, sparse=sparse), torch.tensor([3, 1, 1])
    losses = torch.tensor([1.0, 2.0, 5.0])
    w = given[index]
    found = weights.weighted_mean(losses, index)
    torch.testing.assert_close(found, (w @ losses) / w.sum())
    found.backward()
    # d/da_i = w_i (1 - w_i) (l_i - mean) / sum w, and an index given twice counts twice.
    each = w * (1 - w) * (losses - (w @ losses) / w.sum()) / w.sum()
    gradient = torch.zeros(4).index_add(0, index, each)
    assert weights.logits.grad.is_sparse == sparse
    torch.testing.assert_close(weights.logits.grad.to_dense(), gradient)
    plain = weights.weighted_mean(losses, index, normalised=False)
    torch.testing.assert_close(plain, (w @ losses) / 3)
    torch.testing.assert_close(weights.weighted_mean(given), given.square().sum() / given.sum())


@pytest.mark.parametrize("sparse", [False, True])
def test_an_index_is_made_of_the_numbers_of_samples(sparse):
    given = torch.tensor([0.2, 0.4, 0.6])
    weights = SampleWeights(3, given, sparse=sparse)
    for index in ([2, 0], 1, torch.tensor([[2, 2]], dtype=torch.int32), torch.tensor(0)):
        torch.testing.assert_close(weights(index), given[index])
    for index in (-1, [0, -3], torch.tensor([0, 3]), torch.tensor([-4])):
        with pytest.raises(IndexError, match=r"index must lie in \[0, 3\)"):
            weights(index)
    mask = given > 0.3
    for index in (mask, mask.tolist(), mask.byte(), given, "all", slice(2)):
        with pytest.raises(TypeError, match="index must be a tensor of integers, got"):
            weights(index)
    torch.testing.assert_close(weights(mask.nonzero().squeeze(1)), given[mask])


def test_a_sparse_gradient_holds_the_batch_only():
    weights = SampleWeights(1000, sparse=True)
    weights(torch.tensor([7, 3])).sum().backward()
    assert weights.logits.grad.coalesce().indices().tolist() == [[3, 7]]


@every_engine
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_hypergradient_in_the_optimizer(engine, sparse, normalised):
    x, y, index = torch.randn(12, 3), torch.randn(12), torch.tensor([0, 5, 2, 9, 11, 3])
    weights = SampleWeights(12, torch.linspace(0.2, 0.8, 12), sparse=sparse)
    v = torch.zeros(3, requires_grad=True)
    rule = torch.optim.SparseAdam if sparse else torch.optim.Adam
    optimizer = check_hypergradient(
        weights.parameters(),
        [v],
        lambda: (x[:5] @ v - y[:5]).square().mean(),
        lambda: (
            weights.weighted_mean((x[index] @ v - y[index]).square(), index, normalised)
            + 0.1 * v.square().sum()
        ),
        engine,
        lr=0.25,
        steps=250,
        rule=rule,
    )
    # Those that are not in the batch have not moved.
    outside = [i for i in range(12) if i not in index.tolist()]
    assert torch.equal(
        weights()[outside], SampleWeights(12, torch.linspace(0.2, 0.8, 12))()[outside]
    )
    assert weights.logits.grad.is_sparse == sparse
    assert {*optimizer.state[weights.logits]} >= {"exp_avg"}


@every_engine
def test_runs_of_sparse_and_dense_weights_are_the_same(engine):
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    ends = []
    for sparse in (False, True):
        torch.manual_seed(1)
        weights, net = SampleWeights(24, 0.5, sparse=sparse), torch.nn.Linear(4, 3)
        rule = torch.optim.SparseAdam if sparse else torch.optim.Adam
        optimizer = PenaltyBilevelOptimizer(
            # The two put eps in different places, so it is made negligible.
            rule(weights.parameters(), lr=0.1, eps=1e-15),
            net.parameters(),
            lower_lr=0.05,
            curvature=engine,
        )
        for batch in torch.arange(24).split(6) * 3:

            def lower(batch=batch, net=net, weights=weights):
                losses = F.cross_entropy(net(x[batch]), y[batch], reduction="none")
                return weights.weighted_mean(losses, batch)

            optimizer.step(lambda net=net: F.cross_entropy(net(x[:8]), y[:8]), lower)
        ends.append(weights().detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-8)
    assert float((ends[0] - 0.5).abs().max()) > 0.05


def test_renormalise_is_the_published_rule_and_leaves_moments():
    given = torch.tensor([0.001, 0.3, 0.9, 0.2])
    weights = SampleWeights(4, given)
    rule = torch.optim.Adam(weights.parameters(), lr=0.0)
    weights().sum().backward()
    rule.step()
    moment = rule.state[weights.logits]["exp_avg"].clone()
    weights.renormalise_()
    wanted = (0.5 * given / given.mean()).clamp(1e-5, 1 - 1e-5)
    assert float(wanted.max()) == 1 - 1e-5
    torch.testing.assert_close(weights(), wanted, rtol=1e-10, atol=0)
    assert torch.equal(rule.state[weights.logits]["exp_avg"], moment)
    assert weights.logits.requires_grad
    weights.renormalise_(mean=0.1, margin=0.07)
    torch.testing.assert_close(
        weights(), (0.1 * wanted / wanted.mean()).clamp(0.07, 0.93), rtol=1e-10, atol=0
    )
    single = SampleWeights(2, 0.5, dtype=torch.float32)
    single.renormalise_(mean=0.999, margin=1e-7)
    assert bool(single.logits.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_renormalised_weights_can_be_moved_in_every_precision(dtype):
    weights = SampleWeights(4, torch.tensor([0.9, 0.01, 0.01, 0.01]), dtype=dtype)
    weights.renormalise_(mean=0.5, margin=1e-7)
    weights().sum().backward()
    assert 1 - 2 * torch.finfo(dtype).eps < float(weights()[0].detach()) < 1
    assert bool((weights.logits.grad > 0).all())


def test_agreement_of_a_model_with_the_labels():
    labels = torch.tensor([2, 0, 1])
    scores = torch.tensor([[0.0, 1, 5], [0, 3, 0], [0, 9, 1]])
    wanted = torch.tensor([0.8, 0.2, 0.8])
    for predictions in (scores, scores.argmax(1)):
        weights = SampleWeights.from_agreement(predictions, labels, 0.8, 0.2, sparse=True)
        torch.testing.assert_close(weights(), wanted)
        assert weights.sparse
    published = SampleWeights.from_agreement(scores, labels)
    torch.testing.assert_close(published(), torch.tensor([0.6, 0.4, 0.6]))


def test_copies_and_checkpoints():
    weights = SampleWeights(3, torch.tensor([0.1, 0.2, 0.3]))
    for other in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert torch.equal(other(), weights())
    sparse = SampleWeights(3, sparse=True)
    sparse.load_state_dict(weights.state_dict())
    assert torch.equal(sparse(), weights())
    assert [*weights.state_dict()] == ["logits"]
    assert "3, sparse=True" in repr(sparse)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SampleWeights(0), ValueError, "count must be an integer >= 1, got 0"),
        (lambda: SampleWeights(3, 1.0), ValueError, r"initial must lie in \(0, 1\)"),
        (lambda: SampleWeights(1, math.nan), ValueError, "initial must lie"),
        (lambda: SampleWeights(3, "half"), TypeError, "initial must be a number or a tensor"),
        (lambda: SampleWeights(3, torch.full((2,), 0.5)), ValueError, r"shape \(3,\), got \(2,\)"),
        (
            lambda: SampleWeights(3).weighted_mean(torch.ones(3, 1)),
            ValueError,
            r'one entry for each weight, \(3,\), got \(3, 1\); take them with reduction="none"',
        ),
        (
            lambda: SampleWeights(3, 1 - 1e-5, dtype=torch.bfloat16),
            ValueError,
            "initial must lie in .* as torch.bfloat16 too, .*; clamp .* eps=0.007812, got 0.99999",
        ),
        (lambda: SampleWeights(3, 1e-9, dtype=torch.float16), ValueError, "as torch.float16 too"),
        (
            lambda: SampleWeights(3, sparse="no"),
            TypeError,
            "sparse must be True or False, got 'no'",
        ),
        (
            lambda: SampleWeights(3).weighted_mean(torch.ones(3), normalised="no"),
            TypeError,
            "normalised must be True or False, got 'no'",
        ),
        (lambda: SampleWeights(3, dtype=torch.int64), TypeError, "dtype must be a floating-point"),
        (
            lambda: SampleWeights(3).weighted_mean(torch.ones(0), torch.ones(0).long()),
            ValueError,
            "losses is empty",
        ),
        (lambda: SampleWeights(3).renormalise_(mean=1.0), ValueError, "got mean=1.0"),
        (lambda: SampleWeights(3).renormalise_(margin=1e-9), ValueError, "margin=1e-09"),
        (
            lambda: SampleWeights.from_agreement(torch.rand(3), torch.ones(3).long()),
            TypeError,
            "predictions must be class numbers",
        ),
        (
            lambda: SampleWeights.from_agreement(torch.rand(4, 2), torch.ones(3).long()),
            ValueError,
            r"same samples, got shapes \(4,\) and \(3,\)",
        ),
        (
            lambda: SampleWeights.from_agreement(torch.ones(3, 1).long(), torch.ones(3).long()),
            ValueError,
            r"predictions of shape \(3, 1\) are scores of 1 .*; give .* predictions.squeeze\(1\)",
        ),
        (
            lambda: SampleWeights.from_agreement(
                torch.tensor([[0.1, 0.9], [torch.nan, 1.0]]), torch.ones(2).long()
            ),
            ValueError,
            "predictions has NaN scores",
        ),
    ],
)
def test_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()
