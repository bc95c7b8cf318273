"""Micro-batches of pure functions and of maps, with parts that differ in what they use."""

import warnings

import pytest
import torch
from micro_batches import joined
from stepping import N_V, C, W, close, start, target_f
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import BilevelWarning, FixedPoint, PenaltyBilevelOptimizer, ValueGap

X = torch.linspace(-1, 1, 3 * N_V, dtype=torch.float64).reshape(3, N_V)


def g(u, v, x):
    return (v * x).exp().sum() + (v - u @ C).square().sum() * (1 + x[0])


def phi(u, v, x):
    return 0.5 * torch.tanh(W @ v + u @ C + x)


def ends_of(lower, penalty, curvature, steps=6):
    """Of micro-batches, and of one batch."""
    ends = []
    for of in (lambda each: each, joined_pure if curvature == "functional" else joined):
        u, v = (t.clone().requires_grad_() for t in start())
        rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD([v], lr=0.1)
        optimizer = PenaltyBilevelOptimizer(*rules, penalty=penalty(), curvature=curvature)

        def call(h, *given, u=u, v=v):
            if curvature == "functional":
                return lambda a, b: h(a[0], b[0], *given)
            return lambda: h(u, v, *given)

        both = [call(target_f), call(lambda *at: 0.5 * target_f(*at))], [call(lower, x) for x in X]
        for _ in range(steps):
            optimizer.step(of(both[0]), of(both[1]))
        assert float(optimizer.metrics.residual_norm) > 1e-3
        count = torch.tensor([float(optimizer.metrics.gradient_evaluations)])
        ends.append((torch.cat([u, v, *optimizer.adjoint]).detach(), count))
    return ends


def joined_pure(functions):
    return lambda u, v: torch.stack([function(u, v) for function in functions]).mean(0)


@pytest.mark.parametrize("penalty", ["stationarity", "paper", ValueGap], ids=str)
def test_pure_functions(penalty):
    make = penalty if callable(penalty) else lambda: penalty
    (parts, _), (whole, _) = ends_of(g, make, "functional")
    close(parts, whole)


@pytest.mark.parametrize("curvature", ["double_backward", "auto", "functional"])
def test_maps(curvature):
    """Phi is the mean of the parts'; a product evaluates it once more."""
    (parts, count), (whole, fewer) = ends_of(phi, FixedPoint, curvature)
    close(parts, whole)
    assert count == fewer + 2 * 6  # a probe and a product


def test_cuts_in_one_part_only():
    """ "auto" goes over to differences for an operation of the last part alone."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, 4)
    u, v = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    parts = [
        lambda: (v - u).square().sum(),
        lambda: F.scaled_dot_product_attention(q * v, k, k).square().mean() * u.sum(),
    ]
    f = lambda: v.sum()  # noqa: E731
    with pytest.warns(BilevelWarning, match="switched to finite differences"):
        optimizer.step(f, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(f, parts)
    assert optimizer.curvature.in_use.name == "finite_difference"


def test_kinks_in_one_part_only():
    """There "auto" never chooses differences, though LayerNorm and GELU would make them cheaper."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    x, u = torch.randn(2, 64, 8), torch.zeros(1, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters())
    parts = [
        lambda: (net(x[0]) - u).relu().square().mean() + (net(x[0]) - u).abs().mean(),
        lambda: (net(x[1]) - u).square().mean(),
    ]
    for _ in range(12):
        optimizer.step(lambda: net(x[0]).square().mean(), parts)
    assert "kinks" in optimizer.curvature.reason


def test_layers_of_one_part_decay_like_the_rest():
    ends = []
    for of in (lambda each: each, joined):
        u = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        v, w = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
        lower = torch.optim.SGD([v, w, unused], lr=0.1, weight_decay=0.3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the lower loss does not depend on")
            optimizer = PenaltyBilevelOptimizer(torch.optim.SGD([u], lr=0.1), lower)
            for _ in range(5):
                optimizer.step(
                    lambda u=u, v=v, w=w: (u + v + w).square().sum(),
                    of(
                        [
                            lambda u=u, v=v, w=w: ((v + w - u) ** 4).sum(),
                            lambda u=u, v=v: (v - 2 * u).square().sum(),
                        ]
                    ),
                )
        assert torch.equal(unused, torch.ones_like(unused))
        ends.append(torch.cat([u, v, w, *optimizer.adjoint]).detach())
    close(*ends)
