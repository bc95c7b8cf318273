"""The paper's synthetic problems SMD20-24: final error of each multiplier rule from random starts.

    python -m benchmarks.smd                     # the table of benchmarks/README.md
    python -m benchmarks.smd --rules default --starts 3 --outer 200

Problems: Mehra & Hamm (ACML 2021), the synthetic ones of the reference implementation. Every run
has its own A (two blocks, 5 x 10, standard normal) and start (uniform in [-5, 5]); float64, Adam
on both levels at one learning rate with cosine decay, 5 lower steps per upper step.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import torch_penalty_bilevel as tpb
from examples.shared import command
from torch_penalty_bilevel import EpsilonTest, LeastSquares, PenaltyBilevelOptimizer, Stationarity

RULES: dict[str, Callable[[], Stationarity]] = {
    "default": lambda: Stationarity(LeastSquares()),
    "default, share=0": lambda: Stationarity(LeastSquares(share=0.0)),
    "paper": lambda: Stationarity(EpsilonTest(weight=1.0, damping=10.0, tolerance=1.0)),
}
# A re-run of the published algorithm with its own settings: 40,001 x 10 steps from one start.
REFERENCE = {20: 3.1e-3, 21: 1.4e-2, 22: 1.8e-3, 23: 8.3e-2, 24: 3.6e-2}
Function = Callable[[Tensor, Tensor], Tensor]


def problem(number: int, generator: torch.Generator) -> tuple[Function, Function, Function]:
    """f, g and the distance to the solution set."""
    A = torch.eye(20)
    if number >= 22:
        blocks = torch.randn(2, 5, 10, generator=generator)
        A = torch.block_diag(*blocks)
    P = torch.linalg.pinv(A) @ A  # projector on the row space

    def square(x: Tensor) -> Tensor:
        return x @ x

    f: Function = {
        20: lambda u, v: square(u) + square(v) - 1,
        21: lambda u, v: square(v) - square(u - v),
        22: lambda u, v: square(A @ v) - square(A @ (u - v)),
        23: lambda u, v: square(v) - square(A @ (u - v)),
        24: lambda u, v: square(u) + square(v),
    }[number]
    if number in (20, 24):
        return (
            f,
            lambda u, v: square(A @ (1 - u - v)),
            lambda u, v: torch.hypot((P @ (u - 0.5)).norm(), (P @ (v - 0.5)).norm()),
        )
    measured_v: Callable[[Tensor], Tensor] = (lambda v: v) if number == 23 else (lambda v: P @ v)
    return (
        f,
        lambda u, v: square(A @ (u - v)),
        lambda u, v: torch.hypot((P @ u).norm(), measured_v(v).norm()),
    )


def final_error(number: int, rule: str, seed: int, outer: int, lr: float) -> float:
    """One run; infinite if it diverged."""
    generator = torch.Generator().manual_seed(1000 * number + seed)
    f, g, error = problem(number, generator)
    u, v = ((torch.rand(20, generator=generator) * 10 - 5).requires_grad_() for _ in "uv")
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v],
        upper_lr=lr,
        lower_lr=lr,
        lower_steps=5,
        warmup_steps=outer // 20,
        penalty=RULES[rule](),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, outer)
    try:
        for _ in range(outer):
            optimizer.step(lambda: f(u, v), lambda: g(u, v))
            scheduler.step()
    except tpb.NonFiniteError:
        return float("inf")
    return error(u, v).item()


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--starts", type=int, default=20, help="random starts per problem")
    parser.add_argument("--outer", type=int, default=1000, help="upper steps (5 lower steps each)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of both levels")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    began = time.perf_counter()
    jobs = [(r, n) for r in options.rules for n in REFERENCE]
    errors: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    with tqdm(total=len(jobs) * options.starts, unit="run") as bar:
        for rule, number in jobs:
            for seed in range(options.starts):
                errors[rule, number].append(
                    final_error(number, rule, seed, options.outer, options.lr)
                )
                bar.update()
    print(
        f"\nfinal error, median / worst of {options.starts} starts, {options.outer} x 5 steps, "
        f"Adam {options.lr} with cosine decay\n"
    )
    print("| rule | " + " | ".join(f"SMD{n}" for n in REFERENCE) + " |")
    print("|---|" + "---|" * len(REFERENCE))
    for rule in options.rules:
        cells = [
            f"{statistics.median(errors[rule, n]):.1e} / {max(errors[rule, n]):.1e}"
            for n in REFERENCE
        ]
        print(f"| {rule} | " + " | ".join(cells) + " |")
    print("| published, 40,001 x 10 | " + " | ".join(f"{e:.1e}" for e in REFERENCE.values()) + " |")
    print(
        f"\ntorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"1 thread, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
