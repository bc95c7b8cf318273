"""The optimizer on the problem of ``digits_l2.py``: what u is worth after so many evaluations.

    python -m benchmarks.digits_waiting                       # seeds 0 to 2, 1,500 lower steps
    python -m benchmarks.digits_waiting --seeds 1 --evaluations 100

From e^-7, Adam on both levels with constant rates. Rows: five lower steps per step of u, with and
without the correction of the multiplier; u waiting for a certificate (``lower_steps="auto"``), also
without pull; and with v corrected, too (``correct_lower=True``). Told are f with the lower level
solved again from zero, the relative certificate at the end, and the number of steps of u. Every row
with each pair of rates; the README shows them all.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.digits_l2 import losses, solve_lower
from examples.shared import command
from torch_penalty_bilevel import (
    BilevelWarning,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)

TOLERANCE = 0.1
WAITING = {"lower_steps": "auto", "certificate_tolerance": TOLERANCE}
ROWS: dict[str, tuple[Callable[[], LeastSquares], dict[str, Any]]] = {
    "no correction": (lambda: LeastSquares(subspace=False), {"lower_steps": 5}),
    "default": (LeastSquares, {"lower_steps": 5}),
    "waiting": (LeastSquares, WAITING),
    "waiting, no pull": (lambda: LeastSquares(share=0.0), WAITING),
    "waiting, v corrected": (lambda: LeastSquares(correct_lower=True), WAITING),
    "waiting, v corrected, no pull": (
        lambda: LeastSquares(share=0.0, correct_lower=True),
        WAITING,
    ),
}


def run(row: str, seed: int, rate: float, evaluations: int) -> tuple[float, float, int]:
    """Re-solved f, relative certificate, steps of u."""
    f, g = losses(seed)
    u = torch.full((64,), -7.0, requires_grad=True)
    v = torch.zeros(64, 10, requires_grad=True)
    make, options = ROWS[row]
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=rate, lower_lr=rate, penalty=Stationarity(make()), **options
    )
    made = steps = 0

    def lower() -> Tensor:
        nonlocal made
        made += 1
        return g(u, v)

    while made < evaluations:
        optimizer.step(lambda: f(u, v), lower)
        steps += 1
    certificate = float(optimizer.metrics.relative_certificate)
    # Where the gradient is 1e-7, f has five digits.
    solved = torch.zeros(64, 10, requires_grad=True)
    solve_lower(g, u.detach(), solved, 1e-7, 2000)
    return float(f(u.detach(), solved.detach())), certificate, steps


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=1500, help="lower steps (1500)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", BilevelWarning)  # of a certificate that is large for long
    print("| row | rates | f, median (range) | certificate | steps of u |")
    print("|---|---|---|---|---|")
    for row in options.rows:
        for rate in options.rates:
            seeds = tqdm(range(options.seeds), desc=f"{row}, {rate:g}", leave=False)
            ends = [run(row, seed, rate, options.evaluations) for seed in seeds]
            losses_, certificates, steps = zip(*ends, strict=True)
            print(
                f"| {row} | {rate:g} | {statistics.median(losses_):.4f} ({min(losses_):.4f} to "
                f"{max(losses_):.4f}) | {statistics.median(certificates):.3f} "
                f"({min(certificates):.3f} to {max(certificates):.3f}) "
                f"| {statistics.median(steps):.0f} |",
                flush=True,
            )
    seeds = f"Seeds 0 to {options.seeds - 1}"
    print(f"\n{seeds}, {options.evaluations} lower steps; {command.machine()}")


if __name__ == "__main__":
    main()
