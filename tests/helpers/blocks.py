"""What the tests of ``torch_penalty_bilevel.nn`` share: a block inside the optimizer."""

import pytest
import torch

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

# A difference of gradients in float64 has eight digits or fewer.
ENGINES = {"double_backward": 1e-8, "finite_difference": 1e-6}
every_engine = pytest.mark.parametrize("engine", ENGINES)


def exact(upper, lower, f, g):
    """f_u - J H^-1 f_v with a dense H, at the live tensors."""
    slopes = torch.autograd.grad(f(), [*lower, *upper], materialize_grads=True)
    f_v = torch.cat([t.reshape(-1) for t in slopes[: len(lower)]])
    residual = torch.autograd.grad(g(), lower, create_graph=True)
    r = torch.cat([t.reshape(-1) for t in residual])
    rows = [torch.autograd.grad(x, lower, retain_graph=True, materialize_grads=True) for x in r]
    H = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
    q = -torch.linalg.solve(H, f_v)
    product = torch.autograd.grad(r @ q, upper, materialize_grads=True)
    return [a.to_dense() + b.to_dense() for a, b in zip(slopes[len(lower) :], product, strict=True)]


def check_hypergradient(upper, lower, f, g, engine, lr, steps=150, rule=torch.optim.SGD, **options):
    """Solve below, with the upper level held: ``grad`` of the upper tensors is the exact one."""
    upper, lower = list(upper), list(lower)
    optimizer = PenaltyBilevelOptimizer(
        rule(upper, lr=1e-9),
        torch.optim.SGD(lower, lr=lr),
        penalty=Stationarity(LeastSquares(share=0.0)),
        curvature=engine,
        **options,
    )
    for _ in range(steps):
        optimizer.lower_step(f, g)
    assert float(optimizer.metrics.relative_certificate) < 1e-9 + 0.01 * ENGINES[engine]
    wanted = exact(upper, lower, f, g)
    optimizer.upper_step(f, g)
    for parameter, gradient in zip(upper, wanted, strict=True):
        assert float(gradient.norm()) > 1e-3
        tolerance = ENGINES[engine] * float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad.to_dense(), gradient, rtol=0, atol=tolerance)
    return optimizer
