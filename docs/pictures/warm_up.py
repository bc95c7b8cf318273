"""What u does while the multiplier has not learned yet.

The problem of ``adjoint`` in 30 dimensions, with a lower level that is stiff in some directions and
flat in others (eigenvalues from 1 down to 1 / 1000, turned at random):
g = (v - 2u)' H (v - 2u) / 2,  f = |v - 1|^2 / 2 + |u + 1|^2 / 2, solution u_i = 1 / 5.
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer


def run(seed: int, warmup_steps: int, steps: int = 300) -> list[float]:
    """Root mean square distance of u from the solution, from u = -1/2 and v = v*(u)."""
    torch.manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(30, 30)).Q
    H = turn @ torch.diag(torch.logspace(0, -3, 30)) @ turn.T
    u = torch.full((30,), -0.5, requires_grad=True)
    v = torch.full((30,), -1.0, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=0.01, lower_lr=0.02, warmup_steps=warmup_steps
    )
    way = []
    for _ in range(steps):
        optimizer.step(
            lambda: (v - 1).square().sum() / 2 + (u + 1).square().sum() / 2,
            lambda: (v - 2 * u) @ H @ (v - 2 * u) / 2,
        )
        way.append((u.detach() - 0.2).square().mean().sqrt().item())
    return way


def draw(folder: Path) -> None:
    """Five seeds with and five without; prints how far u goes astray after step 120."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for warmup_steps, colour, label in ((0, "C3", "as it comes"), (300, "C0", "with a warm-up")):
        ways = [run(seed, warmup_steps) for seed in range(5)]
        astray = statistics.median(max(way[120:]) for way in ways)
        print(f"{label}: at most {astray:.3f} from the solution after step 120, median of 5 seeds")
        for seed, way in enumerate(ways):
            axes.plot(way, color=colour, alpha=0.7, label=None if seed else label)
    axes.set(xlabel="step", ylabel="distance of u from the solution", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(folder / "warm-up.png", dpi=110)
    plt.close(figure)
