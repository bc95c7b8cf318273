"""What a diagonal preconditioner of the multiplier earns, on two problems with scales of their own.

    python -m benchmarks.preconditioner --data DIR  # the tables of docs/concepts/multiplier.md
    python -m benchmarks.preconditioner --data DIR --waiting
    python -m benchmarks.preconditioner --problems digits --steps 30

    digits      ``digits_l2.py`` from e^-7, 300 x 5 steps. P: the diagonal of H in every step
    newsgroups  ``race/l2.py``, one L2 weight per word of 20 Newsgroups, 100 x 10 steps. P: a guess
                of it, 3e-3 times the mean of x_j^2, and the L2 weight

Adam with rate 0.1 on both levels, cosine decay; u does not wait, or with --waiting for a
certificate of 0.05 (``lower_steps="auto"``) and a third of the steps. Told per rule: the median
over the second half of the run, and over the seeds, of the relative certificate; f at the end, the
lower level solved on by L-BFGS (digits: 500 iterations); gradients and products. Seeds 0, 1, ...
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import digits_l2
from benchmarks.race import l2
from examples.data.mirrors import default_folder
from examples.shared import command
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

Loss = Callable[[], Tensor]


class Problem(NamedTuple):
    """Two losses, and what is known of H."""

    u: Tensor
    v: Tensor
    upper: Loss
    lower: Loss
    diagonal: Loss
    """P's, shaped like v."""
    solved: Callable[[], float]
    """F on the lower level, solved on."""
    steps: int
    lower_steps: int
    options: dict[str, Any]


def digits(seed: int, data: Path) -> Problem:
    """One L2 weight per pixel."""
    torch.set_default_dtype(torch.float64)
    f, g = digits_l2.losses(seed)
    x = digits_l2.shuffled(seed)[0][:600]
    u = torch.full((64,), -7.0, requires_grad=True)
    v = torch.zeros(64, 10, requires_grad=True)

    def diagonal() -> Tensor:
        p = (x @ v).softmax(1)
        return x.square().T @ (p * (1 - p)) / len(x) + u.exp()[:, None]

    def solved() -> float:
        w = v.detach().clone().requires_grad_()
        digits_l2.solve_lower(g, u.detach(), w, 1e-9, iterations=500)
        return float(f(u, w))

    return Problem(u, v, lambda: f(u, v), lambda: g(u, v), diagonal, solved, 300, 5, {})


def newsgroups(seed: int, data: Path) -> Problem:
    """One L2 weight per word."""
    torch.set_default_dtype(torch.float32)
    problem = l2.make_problem("newsgroups", seed, data, l2.FEATURES, l2.POSTS)
    task = l2.Task(problem)
    (u,), (v,) = task.upper, task.lower

    def diagonal() -> Tensor:
        entries = 3e-3 * problem.train.mean_squares + u.exp() / v.numel()
        return entries[:, None].expand_as(v)

    def solved() -> float:
        return problem.validation.loss(problem.solved(u, v)).item()

    # The product with the sparse matrix is linear, which "auto" cannot know.
    options = {"upper_constraint": task.upper_constraint, "curvature": "double_backward"}
    return Problem(u, v, task.upper_loss, task.lower_loss, diagonal, solved, 100, 10, options)


PROBLEMS: dict[str, Callable[[int, Path], Problem]] = {"digits": digits, "newsgroups": newsgroups}
ROWS = {
    "plain step": (False, False),
    "with correction (default)": (True, False),
    "plain step, preconditioned": (False, True),
    "with correction, preconditioned": (True, True),
}


class End(NamedTuple):
    """How a run ended."""

    certificate: float
    """Median of the second half."""
    loss: float
    """F."""
    evaluations: float
    """Gradients and products."""


def run(problem: Problem, steps: int, *, subspace: bool, scaled: bool, waiting: bool) -> End:
    """One rule on one problem."""

    def preconditioner(vectors: tuple[Tensor, ...], power: float) -> tuple[Tensor, ...]:
        return tuple(problem.diagonal() ** power * t for t in vectors)

    rule = LeastSquares(subspace=subspace, preconditioner=preconditioner if scaled else None)
    optimizer = PenaltyBilevelOptimizer(
        [problem.u],
        [problem.v],
        upper_lr=0.1,
        lower_lr=0.1,
        lower_steps="auto" if waiting else problem.lower_steps,
        warmup_steps=steps // 20,
        penalty=Stationarity(rule),
        **problem.options,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    certificates = []
    for _ in range(steps):
        optimizer.step(problem.upper, problem.lower)
        scheduler.step()
        certificates.append(float(optimizer.metrics.relative_certificate))
    evaluations = optimizer.metrics.gradient_evaluations
    return End(statistics.median(certificates[steps // 2 :]), problem.solved(), evaluations)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=2, help="(2)")
    parser.add_argument("--steps", type=int, help="of u, in place of 300 and 100")
    parser.add_argument("--waiting", action="store_true", help="u waits for the certificate")
    folder = default_folder("20newsgroups")
    parser.add_argument("--data", type=Path, default=folder, help="of 20 Newsgroups")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(name, row) for name in options.problems for row in ROWS]
    lines = []
    for name, row in tqdm(jobs, unit="row"):
        subspace, scaled = ROWS[row]
        ends: list[End] = []
        for seed in range(options.seeds):
            problem = PROBLEMS[name](seed, options.data)
            steps = options.steps or problem.steps // (3 if options.waiting else 1)
            end = run(problem, steps, subspace=subspace, scaled=scaled, waiting=options.waiting)
            ends.append(end)
        end = End(*(statistics.median(column) for column in zip(*ends, strict=True)))
        lines.append(
            f"| {name} | {row} | {end.certificate:.2g} | {end.loss:.3f} | {end.evaluations:,.0f} |"
        )
    print("| problem | multiplier | certificate | f at the end | evaluations |")
    print("|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"\nMedian of seeds 0 to {options.seeds - 1}; {command.machine()}")


if __name__ == "__main__":
    main()
