"""The correction of the multiplier and of v on CUDA: the numbers of the CPU, and no more waits."""

import pytest
import torch
from waiting import waits

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = "cuda:0"


def corrected_run(place, dtype=torch.float64, steps=40, **options):
    """Lower steps on an ill-conditioned quadratic whose batches are all alike."""
    generator = torch.Generator().manual_seed(0)
    n = 12
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    hessian = (basis * torch.logspace(0, 2, n, dtype=torch.float64)) @ basis.T
    slope, target = torch.randn(2, n, generator=generator, dtype=torch.float64)
    hessian, slope, target = (t.to(place, dtype) for t in (hessian, slope, target))
    u, v = (torch.zeros(k, dtype=dtype, device=place, requires_grad=True) for k in (1, n))
    penalty = Stationarity(LeastSquares(**options))
    made = PenaltyBilevelOptimizer([u], [v], lower_lr=1e-2, penalty=penalty)

    def f():
        return slope @ v + u.square().sum()

    def g():
        return (v - target) @ hessian @ (v - target) / 2 + u.sum() * v.sum()

    for _ in range(steps):
        made.step(f, g)
    return v.detach(), made, (f, g)


@pytest.mark.parametrize("options", [{}, {"correct_lower": True}, {"subspace": False}])
def test_the_correction(options):
    (mine, made, _), (theirs, other, _) = (corrected_run(p, **options) for p in (CUDA, "cpu"))
    # Sums in another order, which 40 steps amplify.
    torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(made.adjoint[0].cpu(), other.adjoint[0], rtol=1e-8, atol=1e-8)
    gains = [float(o.metrics.correction_gain) for o in (made, other)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-8, nan_ok=True)
    if options.get("subspace", True):
        assert gains[0] > 0.5


def test_the_correction_in_float32_with_tf32():
    """Inner products are those of float64 whatever the matrix products of the losses may round."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        _, made, _ = corrected_run(CUDA, torch.float32, 60)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    plain = corrected_run("cpu", torch.float32, 60, subspace=False)[1]
    assert made.metrics.relative_certificate < 0.5 * plain.metrics.relative_certificate


@pytest.mark.parametrize("options", [{}, {"correct_lower": True}])
def test_the_correction_waits_no_more(options):
    _, made, losses = corrected_run(CUDA, **options)
    counts = [waits(lambda: made.step(*losses)) for _ in range(10)]
    plain = corrected_run(CUDA, subspace=False)
    expected = [waits(lambda: plain[1].step(*plain[2])) for _ in range(10)]
    assert counts == expected
