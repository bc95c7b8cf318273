"""The paper's synthetic problems SMD20-24: final error of each multiplier rule from random starts.

    python -m benchmarks.smd                     # the table of benchmarks/README.md
    python -m benchmarks.smd --rules default --starts 3 --outer 200

The problems, starts and errors of ``examples.synthetic``, which compares the methods: every seed
has its own A and start; float64, Adam on both levels at one learning rate with cosine decay, 5
lower steps per upper step.
"""

from __future__ import annotations

import statistics
import time

import torch
from tqdm import tqdm

import torch_penalty_bilevel as tpb
from examples.shared import command
from examples.synthetic import formulation, methods
from examples.synthetic.report import AGAIN, RERUN
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

RULES = {
    "default": methods.RULES["penalty"],
    "default, share=0.1": lambda: LeastSquares(share=0.1),
    "default, share=0": methods.RULES["penalty_no_pull"],
    "paper": methods.RULES["paper"],
}
NUMBERS = range(20, 25)


def final_error(number: int, rule: str, seed: int, outer: int, lr: float) -> float:
    """One run; infinite if it diverged."""
    problem = formulation.problem(f"smd{number}", seed)
    u, v = formulation.start(problem, seed)
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v],
        upper_lr=lr,
        lower_lr=lr,
        lower_steps=5,
        warmup_steps=outer // 20,
        penalty=Stationarity(RULES[rule]()),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, outer)
    try:
        for _ in range(outer):
            optimizer.step(lambda: problem.upper_loss(u, v), lambda: problem.lower_loss(u, v))
            scheduler.step()
    except tpb.NonFiniteError:
        return float("inf")
    return formulation.error(problem, u, v)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--starts", type=int, default=20, help="random starts per problem")
    parser.add_argument("--outer", type=int, default=1000, help="upper steps (5 lower steps each)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of both levels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    jobs = [(r, n) for r in options.rules for n in NUMBERS]
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
    print("| rule | " + " | ".join(f"SMD{n}" for n in NUMBERS) + " |")
    print("|---|" + "---|" * len(NUMBERS))
    for rule in options.rules:
        cells = [
            f"{statistics.median(errors[rule, n]):.1e} / {max(errors[rule, n]):.1e}"
            for n in NUMBERS
        ]
        print(f"| {rule} | " + " | ".join(cells) + " |")
    print(f"| {AGAIN} | " + " | ".join(f"{e:.1e}" for e in RERUN.values()) + " |")
    print(f"\n{command.machine()}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
