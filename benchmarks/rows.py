"""What a step costs against the number of per-sample weights: dense Adam and SparseAdam.

    python benchmarks/rows.py

g = mean of sigmoid(u_i) (x_i'v - 1)^2 over a batch of 200, f = |v - 1|^2, v of 20 numbers. u is
an ``nn.Embedding(n, 1)``, once dense with Adam and once sparse with SparseAdam. Milliseconds per
step: median and the middle half of 60 steps (dense from a million rows on: 12).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from tqdm import tqdm

from torch_penalty_bilevel import PenaltyBilevelOptimizer


def milliseconds(rows: int, sparse: bool) -> str:
    """Median and quartiles of one step."""
    torch.manual_seed(0)
    weights = torch.nn.Embedding(rows, 1, sparse=sparse)
    rule = torch.optim.SparseAdam if sparse else torch.optim.Adam
    v = torch.zeros(20, requires_grad=True)
    x, batch = torch.randn(200, 20), torch.randint(0, rows, (200,))
    optimizer = PenaltyBilevelOptimizer(rule(weights.parameters(), lr=0.1), [v])
    times = []
    for _ in range(12 if rows >= 10**6 and not sparse else 60):
        began = time.perf_counter()
        optimizer.step(
            lambda: (v - 1).square().sum(),
            lambda: (torch.sigmoid(weights(batch)[:, 0]) * (x @ v - 1).square()).mean(),
        )
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    table = [
        f"| {rows:,} | {milliseconds(rows, sparse=False)} | {milliseconds(rows, sparse=True)} |"
        for rows in tqdm((10**3, 10**4, 10**5, 10**6, 10**7))
    ]
    print("\n| rows | dense, Adam | sparse, SparseAdam |\n|---|---|---|")
    print("\n".join(table))
    print(
        f"\ntorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        "1 thread"
    )


if __name__ == "__main__":
    main()
