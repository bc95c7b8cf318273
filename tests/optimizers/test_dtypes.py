"""Lower precision follows float64; dtypes mix; autocast stays inside the closures."""

import pytest
import torch
from classifying import classification, network
from torch.nn import functional as F

from torch_penalty_bilevel import EpsilonTest, PenaltyBilevelOptimizer, Stationarity


@pytest.mark.filterwarnings("ignore:the (lower parameters|upper parameter) .* 16 bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference", "functional"])
def test_lower_precision_follows_float64(dtype, curvature):
    """One hypergradient after a few lower steps, against float64 at the same point."""
    u0, v0 = torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.75, -0.5, 0.125])

    def f(u, v):
        return ((v - u) ** 2).sum() + v.prod()

    def g(u, v):
        return (torch.cosh(v) - u.tanh() * v).sum() + (v.sum() - 0.5) ** 2

    gradients = []
    for kind in (torch.float64, dtype):
        u = u0.clone().to(kind).requires_grad_()
        v = v0.clone().to(kind).requires_grad_()
        engine = curvature if kind is dtype else "double_backward"
        optimizer = PenaltyBilevelOptimizer(
            [u],
            torch.optim.SGD([v], lr=0.0),
            curvature=engine,
            penalty=Stationarity(EpsilonTest(weight=0.5, damping=0.0)),
        )
        if engine == "functional":
            optimizer.upper_step(lambda a, b: f(a[0], b[0]), lambda a, b: g(a[0], b[0]))
        else:
            optimizer.upper_step(lambda u=u, v=v: f(u, v), lambda u=u, v=v: g(u, v))
        gradients.append(u.grad)
        assert u.grad.dtype == u.dtype
        assert optimizer.adjoint[0].dtype == torch.promote_types(kind, torch.float32)
    # A difference at the default step: about 3e-4 (forward, 32 bits) and 3e-2 (central, 16 bits).
    exact = curvature != "finite_difference"
    tolerance = {torch.float32: 1e-5 if exact else 3e-3, torch.bfloat16: 0.05 if exact else 0.1}
    error = (gradients[1].double() - gradients[0]).norm() / gradients[0].norm()
    assert float(error) < tolerance[dtype]


@pytest.mark.filterwarnings("ignore:the lower parameters .* have 16 bits")
def test_mixed_dtypes_in_one_level_stay_and_take_the_same_steps():
    """Three steps of Adam from the same value, apart by bfloat16's rounding only."""
    a = torch.ones(2, dtype=torch.float32, requires_grad=True)
    b = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], [a, b], lower_lr=0.1, upper_lr=0.1)
    for _ in range(3):
        optimizer.step(
            lambda: a.square().sum() + b.float().square().sum() + u.square().sum(),
            lambda: ((a - u) ** 2).sum() + ((b - u.to(torch.bfloat16)) ** 2).sum().float(),
        )
    assert a.dtype == torch.float32
    assert b.dtype == torch.bfloat16
    assert a.grad.dtype == torch.float32
    assert float(a.detach()[0]) < 0.8
    # Half an ulp of bfloat16 below 1, 2e-3, in each of three steps.
    torch.testing.assert_close(a.detach(), b.detach().float(), rtol=0, atol=6e-3)


def test_autocast_inside_the_closures():
    x, y = classification()
    x = x.float()
    norms = []
    for enabled in (False, True):
        net = network().float()
        u = torch.zeros(24, dtype=torch.float32, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer([u], net.parameters(), penalty="paper")

        def loss(net=net, enabled=enabled, **options):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = net(x)
            return F.cross_entropy(logits.float(), y, **options)

        optimizer.upper_step(
            lambda loss=loss: loss(),
            lambda loss=loss, u=u: (u.exp() * loss(reduction="none")).mean(),
        )
        assert u.grad.dtype == torch.float32
        norms.append(u.grad)
    # bfloat16 activations keep 8 bits: single percents.
    assert float((norms[0] - norms[1]).norm() / norms[0].norm()) < 0.05
