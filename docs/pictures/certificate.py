"""The certificate of a run beside the true error of its hypergradients.

A quadratic lower level of 40 unknowns with eigenvalues from 1 down to 1 / 100, held at one u, and
v at the lower solution: the multiplier starts at 0 and learns the adjoint.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer


def run(steps: int = 150) -> list[tuple[float, float, float]]:
    """Per step: the relative certificate, the error of the hypergradient, and its bound."""
    generator = torch.Generator().manual_seed(0)
    n, options = 40, {"dtype": torch.float64, "generator": generator}
    eigenvalues = torch.logspace(0, -2, n, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(n, n, **options)).Q
    H, A = turn @ torch.diag(eigenvalues) @ turn.T, torch.randn(n, 5, **options)
    wish = torch.randn(n, **options)
    u = torch.randn(5, **options).requires_grad_()
    v = torch.linalg.solve(H, A @ u.detach()).requires_grad_()
    exact = A.T @ torch.linalg.solve(H, v.detach() - wish)  # J = -A', grad_u f = 0
    gain = torch.linalg.matrix_norm(A.T @ torch.linalg.inv(H), 2)
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([u], lr=0.0), torch.optim.SGD([v], lr=0.0), curvature="double_backward"
    )
    seen = []
    for _ in range(steps):
        optimizer.step(lambda: (v - wish).square().sum() / 2, lambda: v @ H @ v / 2 - v @ (A @ u))
        metrics = optimizer.metrics
        error = (u.grad - exact).norm() / exact.norm()
        bound = gain * metrics.adjoint_residual_norm / exact.norm()
        seen.append((float(metrics.relative_certificate), float(error), float(bound)))
    return seen


def draw(folder: Path) -> None:
    """The three numbers over the steps."""
    certificate, error, bound = zip(*run(), strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.semilogy(bound, "--", color="C7", label="bound of the error, ‖JH⁻¹‖ ‖∇ᵥf + Hq‖")
    axes.semilogy(error, color="C3", label="error of the hypergradient (relative)")
    axes.semilogy(certificate, color="C0", label="certificate (relative)")
    axes.set(xlabel="step")
    axes.legend(fontsize="small")
    figure.savefig(folder / "certificate.png", dpi=110)
    plt.close(figure)
