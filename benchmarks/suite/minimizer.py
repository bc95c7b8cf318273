"""``minimize`` on the analytic problems of ``torch_penalty_bilevel.testing``, one configuration.

    python -m benchmarks.suite.minimizer --starts 5           # the table of benchmarks/README.md
    python -m benchmarks.suite.minimizer ripple sine --starts 1000 --restarts 0
    python -m benchmarks.suite.minimizer d_1978_01 half_space --starts 1 --restarts 0 --barrier-only

Per problem, over random starts: the worst error (distance to the nearest solution over
max(1, ||solution||)), the worst gap f - f*, the worst gap of the lower loss g - min g at the u
found, median and largest number of evaluations, and how the runs ended.
"""

from __future__ import annotations

import argparse
import collections
import statistics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.shared import command
from torch_penalty_bilevel import MinimizeResult, minimize, testing
from torch_penalty_bilevel.constraints import Box, Inequality
from torch_penalty_bilevel.newton import active_set


def lower_loss(problem: testing.Problem, u: Tensor, v: Tensor) -> Tensor:
    """g; for an equilibrium v = Phi(u, v) the loss |v - Phi|^2 / 2."""
    if problem.lower_loss is not None:
        return problem.lower_loss(u, v)
    assert problem.lower_map is not None
    return (v - problem.lower_map(u, v)).square().sum() / 2


def restriction(box: testing.protocol.Bounds | None, h: testing.protocol.Loss | None) -> list[Any]:
    """A level's constraints as objects of the package."""
    parts = [] if box is None else [Box(*box)]
    return parts if h is None else [*parts, Inequality(h)]


def run(problem: testing.Problem, seed: int, options: argparse.Namespace) -> MinimizeResult:
    """One solve."""
    u, v = problem.start(torch.Generator().manual_seed(seed))
    return minimize(
        problem.upper_loss,
        lambda u, v: lower_loss(problem, u, v),
        u,
        v,
        max_evaluations=options.budget,
        restarts=options.restarts,
        tolerance=options.tolerance,
        upper_constraint=restriction(problem.upper_box, problem.h_upper) or None,
        lower_constraint=restriction(problem.lower_box, problem.h_lower) or None,
    )


def lower_gap(problem: testing.Problem, result: MinimizeResult) -> float:
    """How far v is from minimising g globally."""
    u = result.upper
    return float(
        lower_loss(problem, u, result.lower) - lower_loss(problem, u, problem.best_lower(u))
    )


def row(problem: testing.Problem, options: argparse.Namespace) -> str:
    """A line of the table."""
    results = [run(problem, seed, options) for seed in range(options.starts)]
    error = max(float(problem.error(r.upper, r.lower)) for r in results)
    gap = max(r.upper_loss - problem.optimal_value for r in results)
    missed = max(lower_gap(problem, r) for r in results)
    counts = [r.evaluations for r in results]
    ends = collections.Counter(r.status for r in results).most_common()
    cells = [
        problem.name,
        f"{error:.1e}",
        f"{gap:.1e}",
        f"{missed:.1e}",
        f"{statistics.median(counts):.0f} / {max(counts)}",
        ", ".join(f"{status} {n}" for status, n in ends),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("names", nargs="*", help="problems; default: all")
    parser.add_argument("--starts", type=int, default=10, help="random starts per problem")
    parser.add_argument("--budget", type=int, default=5000, help="evaluations per run")
    parser.add_argument("--restarts", type=int, default=40, help="further runs within the budget")
    parser.add_argument("--tolerance", type=float, default=1e-8)
    parser.add_argument(
        "--barrier-only", action="store_true", help="without the active-set equation at the end"
    )
    options = parser.parse_args()
    if options.barrier_only:
        active_set.DENSE = 0
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    problems = [testing.get(name) for name in options.names or testing.names()]
    rows = [row(p, options) for p in tqdm(problems, unit="problem")]
    print("\n| problem | error | f - f* | g - min g | evaluations, median / max | ends |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{options.starts} starts each; {command.machine()}")


if __name__ == "__main__":
    main()
