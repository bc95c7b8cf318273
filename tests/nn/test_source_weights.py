"""Weights of sources: the least share of the uniform distribution, and derivatives through it."""

import copy
import math

import pytest
import torch
from blocks import check_hypergradient, every_engine
from scipy.optimize import brentq
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, vmap

from torch_penalty_bilevel.nn import SourceWeights


def entropy(w):
    return float(torch.special.entr(w.detach()).sum())


def by_bisection(p, floor):
    """The least share, by scipy."""
    if entropy(p) >= floor:
        return p
    mixed = lambda s: (1 - s) * p + s / len(p)  # noqa: E731
    return mixed(brentq(lambda s: entropy(mixed(s)) - floor, 0, 1, xtol=1e-15, rtol=1e-14))


@pytest.mark.parametrize("count", [2, 5, 300])
@pytest.mark.parametrize("part", [1e-6, 0.01, 0.3, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0, 60.0, 2000.0])
def test_the_least_share_reaches_the_floor(count, part, size):
    floor = part * math.log(count)
    weights = SourceWeights(count, floor)
    with torch.no_grad():
        weights.logits.copy_(size * torch.randn(count))
    w, p = weights().detach(), weights.logits.detach().softmax(0)
    torch.testing.assert_close(w.sum(), torch.tensor(1.0))
    assert entropy(w) >= floor - 1e-14 * count
    torch.testing.assert_close(w, by_bisection(p, floor), rtol=1e-9, atol=1e-8 / count)
    if entropy(p) >= floor:
        assert torch.equal(w, p)
    assert torch.equal(weights(torch.tensor([1, 0, 1])), weights()[[1, 0, 1]])


def test_no_floor_is_a_softmax():
    weights = SourceWeights(4)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([1.0, -800, 3, 800]))
    assert torch.equal(weights(), weights.logits.softmax(0))


def function(floor, count=4):
    block = SourceWeights(count, floor)
    return lambda logits: functional_call(block, {"logits": logits}, ())


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.8, 1.2])
@pytest.mark.parametrize("size", [0.5, 3.0, 8.0])
def test_first_and_second_derivatives(floor, size):
    logits = (size * torch.tensor([1.0, -0.3, 0.2, -1.1])).requires_grad_()
    mixed = entropy(logits.softmax(0)) < floor
    assert mixed == (floor > {0.5: 1.25, 3.0: 0.5, 8.0: 0.0}[size])
    assert gradcheck(function(floor), logits, atol=1e-7)
    assert gradgradcheck(function(floor), logits, atol=1e-6)


def test_derivatives_are_those_of_the_implicit_function():
    """s' = -h_p / h_s by hand, with h = H((1 - s) p + s / K) - floor."""
    floor, logits = 1.1, torch.tensor([2.0, 0.5, -1.0, -2.0])
    p = logits.softmax(0)
    w = by_bisection(p, floor)
    s = float((w - p)[0] / (0.25 - p)[0])
    log = w.log() + 1
    h_s = -(log @ (0.25 - p))
    ds = (1 - s) * log / h_s  # ds / dp
    dw = (1 - s) * torch.eye(4) + torch.outer(0.25 - p, ds)
    wanted = dw @ (torch.diag(p) - torch.outer(p, p))
    torch.testing.assert_close(jacrev(function(floor))(logits), wanted, rtol=1e-10, atol=1e-12)


def test_third_derivatives():
    """Of the two steps of Newton's method: differences of second derivatives."""
    call, logits = function(1.1), torch.tensor([2.0, 0.5, -1.0, -2.0])
    third = jacrev(hessian(call))(logits)
    step = 1e-5
    for i, e in enumerate(torch.eye(4)):
        slope = (hessian(call)(logits + step * e) - hessian(call)(logits - step * e)) / (2 * step)
        torch.testing.assert_close(third[..., i], slope, rtol=0, atol=1e-8)


def test_gradients_stay_finite_at_the_ends():
    for values in ([0.0, 0, 0], [1000.0, 0, 0], [1000.0, 1000, 0]):
        logits = torch.tensor(values, requires_grad=True)
        function(0.7, 3)(logits).square().sum().backward()
        assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [1e-300, 1e-20, 1e-8, 1e-7, 1e-5])
@pytest.mark.parametrize("values", [(50.0, 0, 0), (1e4, 0, 0), (18.0, 0, -1), (0.0, 0, 0)])
def test_floors_below_rounding_are_kept(dtype, floor, values):
    """Near the corner the share is between the one of the floor and one unit of rounding."""
    block = SourceWeights(3, floor, dtype=dtype)
    with torch.no_grad():
        block.logits.copy_(torch.tensor(values))
    w, p = block(), block.logits.detach().softmax(0)
    w[0].log().backward()
    assert bool(block.logits.grad.isfinite().all())
    assert bool(hessian(lambda z: function(floor, 3)(z)[0])(block.logits.detach()).isfinite().all())
    if entropy(p) >= floor:
        assert torch.equal(w, p)
        return
    # The largest weight is rounded by half a unit, and the entropy there changes with it.
    assert entropy(w.double()) >= floor - torch.finfo(dtype).eps
    assert entropy(w.double()) > 0.99 * floor
    exact = by_bisection(p.double(), floor)
    assert float((w - exact).detach().abs().max()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entropy_just_below_the_floor_with_a_weight_of_zero(dtype):
    """The root is within rounding of s = 0, where the logarithm of the third weight is infinite."""
    logits = torch.tensor([1.0, 0, -2000], dtype=dtype, requires_grad=True)
    h = entropy(logits.softmax(0))
    for floor in (h, h + torch.finfo(dtype).eps / 4, h + torch.finfo(dtype).eps):
        w = function(floor, 3)(logits)
        (gradient,) = torch.autograd.grad(w[0], logits)
        torch.testing.assert_close(w, logits.softmax(0), rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert bool(gradient.isfinite().all())
        assert bool((w >= 0).all())


def test_under_vmap_and_in_low_precision():
    logits = 3 * torch.randn(6, 4)
    together = vmap(function(1.0))(logits)
    torch.testing.assert_close(together, torch.stack([function(1.0)(z) for z in logits]))
    for dtype in (torch.float32, torch.bfloat16):
        block = SourceWeights(4, 1.0, dtype=dtype)
        with torch.no_grad():
            block.logits[2] = 40.0
        assert block().dtype == dtype
        assert abs(entropy(block().double()) - 1.0) < 4 * torch.finfo(dtype).eps


@every_engine
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_hypergradient_in_the_optimizer(engine, floor):
    x, y, source = torch.randn(12, 3), torch.randn(12), torch.arange(12) % 3
    weights, v = SourceWeights(3, floor), torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([2.0, 0.0, -1.0]))
    check_hypergradient(
        weights.parameters(),
        [v],
        lambda: (x[:5] @ v - y[:5]).square().mean(),
        lambda: (weights(source) * (x @ v - y).square()).mean() + 0.1 * v.square().sum(),
        engine,
        lr=0.4,
        steps=250,
    )


def test_copies_and_checkpoints():
    weights = SourceWeights(3, 0.5)
    torch.nn.init.normal_(weights.logits)
    other = SourceWeights(3, 0.5)
    other.load_state_dict(weights.state_dict())
    assert torch.equal(other(), weights())
    assert torch.equal(copy.deepcopy(weights)(), weights())
    assert [*weights.state_dict()] == ["logits"]
    assert "3, entropy_floor=0.5" in repr(weights)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SourceWeights(1), "count must be an integer >= 2, got 1"),
        (lambda: SourceWeights(2, 0.7), r"\[0, log\(count\)\) = \[0, 0.6931\) nats, got 0.7"),
        (lambda: SourceWeights(2, -0.1), "entropy_floor must lie"),
        (lambda: SourceWeights(2, math.nan), "entropy_floor must lie"),
        (lambda: SourceWeights(2, "0"), "entropy_floor must lie"),
    ],
)
def test_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
