"""Upper steps every m lower steps: what the lower steps in between have to learn.

    python -m benchmarks.plain_steps            # the tables of benchmarks/README.md
    python -m benchmarks.plain_steps --lower-steps 40 --seeds 1

All runs take the same number of lower steps, and one upper step in every m. "full": ``lower_step``
in between, with a gradient of f and a product each time. "plain": ``plain_lower_step``, a gradient
of g alone. "plain, then 3": the last two before an upper step are full again.

Told are, along the run, ||h - exact|| / max(||h||, ||exact||) of the hypergradient h at the (u, v)
at hand ("here"), and beside the gradient of f(u, v*(u)) ("solved"; v has then also to follow u);
the distance of the end from the solution (digits: f(u, v*(u))); process time over that of plain
training, which takes the same number of steps of the lower rule on g. These problems are so small
that Python takes the time; the second table is of a network, with finite differences.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.multipliers import problems, reference
from examples.shared import command
from torch_penalty_bilevel import PenaltyBilevelOptimizer

NAMES = "quadratic1", "smd20", "digits_batches"
EVERY = 1, 4, 16
LEARNING = {"full": 16, "plain, then 3": 3, "plain": 1}
"""How many of the lower steps before an upper one learn the multiplier."""
LOOKS = 20


class Run(NamedTuple):
    """One run, or medians of several."""

    here: float
    solved: float
    end: float
    seconds: float
    evaluations: float


class Clock:
    """Process time of what is called through it."""

    seconds = 0.0

    def __call__(self, step: Callable[..., object], *given: object) -> None:
        began = time.process_time()
        step(*given)
        self.seconds += time.process_time() - began


def run(name: str, seed: int, every: int, learning: int, lower_steps: int) -> Run:
    task = problems.make(name, seed, Path())
    u, v = (t.detach().clone().requires_grad_() for t in (task.u, task.v))
    rates = {"upper_lr": task.upper_lr, "lower_lr": task.lower_lr}
    optimizer, clock = PenaltyBilevelOptimizer([u], [v], **rates), Clock()
    count = lower_steps // every
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    here, solved = list[float](), list[float]()
    assert task.solved is not None
    for k in range(count):
        for left in range(every, 0, -1):
            f, g = task.batch() if task.batch else (task.f, task.g)
            upper, lower = (lambda f=f: f(u, v)), (lambda g=g: g(u, v))
            if left == 1:
                if k % max(1, count // LOOKS) == 0:
                    best = task.solved(u.detach(), v.detach())
                    estimate, exact, there = (
                        reference.with_adjoint(task.f, task.g, u, at, q)
                        for at, q in (
                            (v, optimizer.adjoint[0]),
                            (v, task.adjoint(u, v)),
                            (best, task.adjoint(u, best)),
                        )
                    )
                    here.append(reference.error(estimate, exact))
                    solved.append(reference.error(estimate, there))
                clock(optimizer.step, upper, lower)
            elif left <= learning:
                clock(optimizer.lower_step, upper, lower)
            else:
                clock(optimizer.plain_lower_step, lower)
        schedule.step()
    end = float(task.score(u.detach(), v.detach()))
    evaluations = optimizer.metrics.gradient_evaluations / lower_steps
    return Run(statistics.mean(here), statistics.mean(solved), end, clock.seconds, evaluations)


def plain_seconds(name: str, lower_steps: int) -> float:
    """Of plain training on g."""
    task, clock = problems.make(name, 0, Path()), Clock()
    u, v = task.u, task.v.detach().clone().requires_grad_()
    rule = torch.optim.Adam([v], lr=task.lower_lr)
    for _ in range(lower_steps):
        g = task.batch()[1] if task.batch else task.g
        clock(train, rule, lambda g=g: g(u, v))
    return clock.seconds


def train(rule: torch.optim.Optimizer, g: Callable[[], Tensor]) -> None:
    rule.zero_grad()
    g().backward()
    rule.step()


def costs(width: int) -> list[tuple[int, float]]:
    """(m, time over that of plain training) of a network, where arithmetic is all; medians."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
    net = nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    u = torch.zeros(256, requires_grad=True)
    rule = torch.optim.Adam(net.parameters())
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), curvature="finite_difference")

    def f() -> Tensor:
        return cross_entropy(net(x), y)

    def g() -> Tensor:
        return (u.sigmoid() * cross_entropy(net(x), y, reduction="none")).mean()

    steps: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (train, (rule, g)),
        (optimizer.plain_lower_step, (g,)),
        (optimizer.step, (f, g)),
    ]
    clocks = [[Clock() for _ in steps] for _ in range(60)]
    for round_ in clocks:  # neighbours in time share what else the machine does
        for clock, (step, closures) in zip(round_, steps, strict=True):
            clock(step, *closures)
    ratios = [[c.seconds / round_[0].seconds for c in round_] for round_ in clocks[20:]]
    _, plain, full = (statistics.median(column) for column in zip(*ratios, strict=True))
    return [(m, ((m - 1) * plain + full) / m) for m in EVERY]


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(column) for column in zip(*runs, strict=True)))


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lower-steps", type=int, default=480)
    parser.add_argument("--width", type=int, default=1024, help="of the network in table two")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        (name, every, how, min(learning, every))
        for name in NAMES
        for every in EVERY
        for how, learning in LEARNING.items()
        if every > 1 or how == "full"
        if every > 4 or how != "plain, then 3"
    ]
    plain = {name: plain_seconds(name, options.lower_steps) for name in NAMES}
    print("| problem | m | in between | error here | solved | end | gradients | time |")
    print("|---|---|---|---|---|---|---|---|")
    for name, every, how, learning in tqdm(rows, leave=False):
        made = (run(name, s, every, learning, options.lower_steps) for s in range(options.seeds))
        found = median(list(made))
        cells = f"{found.here:.3f} | {found.solved:.3f} | {found.end:.2g} | {found.evaluations:.2f}"
        tqdm.write(f"| {name} | {every} | {how} | {cells} | {found.seconds / plain[name]:.1f} |")
    print("\n| m | time of a lower step over plain training |\n|---|---|")
    for every, ratio in costs(options.width):
        print(f"| {every} | {ratio:.2f} |")
    print(
        f"\nMedian of seeds 0 to {options.seeds - 1}, {options.lower_steps} lower steps; gradients "
        f"per lower step. torch {torch.__version__}, one thread."
    )


if __name__ == "__main__":
    main()
