"""Learned strengths of terms: the terms in closed form, their scale, and terms of one's own."""

import copy
import math
import pickle

import pytest
import torch
from blocks import check_hypergradient, every_engine
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import Regularizers
from torch_penalty_bilevel.nn.regularizers import READY, group, l1, l2


def tensors():
    return torch.randn(3, 2, 2), torch.randn(4), torch.randn(())


def test_ready_terms_in_closed_form():
    a, b, c = tensors()
    flat = torch.cat([a.reshape(-1), b, c.reshape(1)])
    torch.testing.assert_close(l2((a, b, c)), flat.square().mean() / 2)
    torch.testing.assert_close(l1((a, b, c), width=1e-9), flat.abs().mean(), rtol=0, atol=1e-8)
    rounded = ((flat.square() + 0.09).sqrt() - 0.3).mean()
    torch.testing.assert_close(l1((a, b, c), width=0.3), rounded)
    # The group lasso of Yuan & Lin (2006): a norm with the root of the size of its group.
    lasso = 2 * a.reshape(3, 4).norm(dim=1).sum() + b.abs().sum() + c.abs()
    torch.testing.assert_close(group((a, b, c), width=1e-9), lasso / 17, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", READY)
def test_ready_terms_have_the_same_scale_whatever_the_size(name):
    small, large = torch.full((2, 3), -0.7), torch.full((50, 70), 0.7)
    term = READY[name]
    torch.testing.assert_close(term((small,)), term((large, small)))
    assert float(term((torch.zeros(3, 2),))) == 0
    wide = term((large.bfloat16(),))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, term((large.bfloat16().float(),)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", READY)
def test_ready_terms_have_two_derivatives(name):
    term = lambda t: READY[name]((t,))  # noqa: E731
    for point in (torch.randn(3, 2), 1e-3 * torch.randn(3, 2), torch.zeros(3, 2)):
        at = point.requires_grad_()
        assert gradcheck(term, at, eps=1e-7, atol=1e-5)
        assert gradgradcheck(term, at, eps=1e-7, atol=1e-3)


def test_the_sum_in_closed_form_and_what_the_terms_get():
    a, b, _ = tensors()
    seen = []

    def own(given):
        seen.append(given)
        return given[0].sum() ** 2

    regularizers = Regularizers({"first": "l1", "l2": l2, "own": own}, initial=0.5)
    torch.testing.assert_close(regularizers.log_strengths.detach(), torch.full((3,), math.log(0.5)))
    with torch.no_grad():
        regularizers.log_strengths.copy_(torch.tensor([-1.0, 0.5, 0.2]))
    wanted = math.exp(-1) * l1((a, b)) + math.exp(0.5) * l2((a, b)) + math.exp(0.2) * a.sum() ** 2
    torch.testing.assert_close(regularizers([a, b]).detach(), wanted)
    torch.testing.assert_close(regularizers({"a": a, "b": b}).detach(), wanted)
    torch.testing.assert_close(regularizers(t for t in (a, b)).detach(), wanted)
    assert all(len(given) == 2 for given in seen)
    assert [*regularizers.strengths()] == ["first", "l2", "own"]
    slopes = torch.autograd.grad(regularizers([a, b]), regularizers.log_strengths)[0]
    torch.testing.assert_close(slopes.sum(), wanted)  # each term is its own slope


@every_engine
def test_hypergradient_in_the_optimizer(engine):
    x, y, model = torch.randn(12, 3), torch.randn(12, 2), nn.Linear(3, 2)
    smooth = lambda given: (given[0][:, 1:] - given[0][:, :-1]).square().mean()  # noqa: E731
    regularizers = Regularizers({"l1": lambda t: l1(t, 0.3), "group": group, "smooth": smooth}, 0.2)
    check_hypergradient(
        regularizers.parameters(),
        model.parameters(),
        lambda: (model(x[:5]) - y[:5]).square().mean(),
        lambda: (model(x) - y).square().mean() + regularizers(model.parameters()),
        engine,
        lr=0.3,
        steps=200,
    )


def test_a_scaled_term_needs_no_other_rate():
    """Adam on the log scale: a term 1,000 times as large moves its strength as fast."""
    x, y, ends = torch.randn(12, 3), torch.randn(12, 2), []
    for factor in (1.0, 1000.0):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        terms = {"own": lambda t, factor=factor: factor * l2(t)}
        regularizers = Regularizers(terms, initial=0.1 / factor)
        optimizer = PenaltyBilevelOptimizer(
            torch.optim.Adam(regularizers.parameters(), lr=0.01, eps=0),
            model.parameters(),
            lower_lr=0.01,
        )
        for _ in range(20):
            optimizer.step(
                lambda model=model: (model(x[:5]) - y[:5]).square().mean(),
                lambda model=model, own=regularizers: (
                    (model(x) - y).square().mean() + own(model.parameters())
                ),
            )
        ends.append(regularizers.log_strengths.detach() + math.log(factor))
    torch.testing.assert_close(*ends)
    assert abs(float(ends[0]) - math.log(0.1)) > 0.01


def test_an_empty_tensor_among_others_adds_nothing():
    for name in READY:
        regularizers, full = Regularizers([name]), torch.randn(2, 3)
        both = regularizers([torch.ones(0, 3), full, torch.ones(3, 0)])
        torch.testing.assert_close(both, regularizers([full]))


def test_copies_and_checkpoints():
    regularizers = Regularizers(["l1", "group"], initial=0.1)
    nn.init.normal_(regularizers.log_strengths)
    given = tensors()
    other = Regularizers(["l1", "group"])
    other.load_state_dict(regularizers.state_dict())
    for twin in (other, copy.deepcopy(regularizers), pickle.loads(pickle.dumps(regularizers))):
        assert torch.equal(twin(given), regularizers(given))
    assert "['l1', 'group']" in repr(regularizers)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Regularizers("l1"), TypeError, "terms must be a list of names or a mapping"),
        (lambda: Regularizers([]), ValueError, "one or more names"),
        (lambda: Regularizers(["l1", "l1"]), ValueError, "each once"),
        (
            lambda: Regularizers(["l3"]),
            ValueError,
            "a term must be one of .* or a callable, got 'l3'",
        ),
        (lambda: Regularizers(["l1"], initial=0.0), ValueError, "initial must be a finite number"),
        (lambda: Regularizers(["l1"])(()), ValueError, "tensors is empty"),
        (
            lambda: Regularizers(["l1"], initial=1e300, dtype=torch.float32),
            ValueError,
            r"initial=1e\+300 is inf as torch.float32",
        ),
        (
            lambda: Regularizers(["l1"], initial=1e-300, dtype=torch.float32),
            ValueError,
            "initial=1e-300 is 0.0 as torch.float32",
        ),
        (
            lambda: Regularizers(["l1"])([torch.ones(0, 3)]),
            ValueError,
            r"tensors must have elements, got shapes \[\(0, 3\)\]",
        ),
        (
            lambda: Regularizers({"own": lambda t: 0.5})([torch.ones(2)]),
            TypeError,
            "term 'own' must return a 0-d tensor, got 0.5",
        ),
        (
            lambda: Regularizers(["group"])(torch.ones(2, 3)),
            TypeError,
            r"got one tensor of shape \(2, 3\), .*; give \[tensor\]",
        ),
        (
            lambda: Regularizers({"own": lambda t: t[0]})([torch.ones(2)]),
            ValueError,
            r"term 'own' must return a 0-d tensor, got shape \(2,\)",
        ),
    ],
)
def test_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()
