"""The default multiplier rule beside others: momentum, Barzilai-Borwein, Krylov, primal-dual, ...

    python -m benchmarks.multipliers --data DIR  # the table of benchmarks/README.md
    python -m benchmarks.multipliers --rules default anderson --problems smd22 --seeds 5

Deterministic problems (float64, Adam 0.1 on both levels, 400 x 5 steps with cosine decay, a
warm-up of at most 20): the final error of ``torch_penalty_bilevel.testing``, median / worst over
seeds 0, 1, ...

    quadratic1, quadratic3   condition number of the lower level 1e1 and 1e3
    smd20 ... smd24          also with the seed's own A
    least_squares            H has a null space

    digits   ``digits_l2.py`` from e^-7, 300 x 5 steps: f after 500 more L-BFGS
             iterations on the lower level (seed 0)
    mnist    ``cleaning.py``'s linear model, 400 x 1 steps of batch 200, the optimizer's rates of
             that benchmark: area under the ROC curve, larger is better, and the largest ||nu|| at
             steps 100, 200, 300, 400 (seed 0)

"inf": an error was raised or v has run off; "warned": the optimizer warned. Cost: gradients and
products per lower step, first problem.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks import digits_l2
from benchmarks.multipliers import rules
from benchmarks.shared import mnist_rows as rows
from examples.shared import command
from torch_penalty_bilevel import (
    BilevelWarning,
    EpsilonTest,
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    testing,
)
from torch_penalty_bilevel.multipliers import MultiplierRule

RULES: dict[str, Callable[[], MultiplierRule]] = {
    "default": LeastSquares,
    "share=0": lambda: LeastSquares(share=0.0),
    "no correction": lambda: LeastSquares(subspace=False),
    "heavy_ball": rules.HeavyBall,
    "nesterov": rules.Nesterov,
    "bb_long": rules.BarzilaiBorwein,
    "bb_short": rules.ShortBarzilaiBorwein,
    "anderson": rules.Anderson,
    "cg": rules.ConjugateGradients,
    "adam": rules.ScaledByAdam,
    "cg_on_v": rules.ConjugateLower,
    "primal_dual": rules.PrimalDual,
    "paper": lambda: EpsilonTest(weight=1.0, damping=10.0, tolerance=1.0),
}
ANALYTIC: dict[str, tuple[str, dict[str, float]]] = {
    "quadratic1": ("quadratic", {"kappa": 1e1}),
    "quadratic3": ("quadratic", {"kappa": 1e3}),
    "smd20": ("smd20", {}),
    "smd21": ("smd21", {}),
    "smd22": ("smd22", {}),
    "smd23": ("smd23", {}),
    "smd24": ("smd24", {}),
    "least_squares": ("least_squares", {}),
}
PROBLEMS = (*ANALYTIC, "digits", "mnist")
Loss = Callable[[], Tensor]


class Job(NamedTuple):
    """What defines a run."""

    rule: str
    problem: str
    seed: int
    data: Path
    share: float
    """Of the upper steps."""


class End(NamedTuple):
    """How a run ended."""

    score: float
    cost: float
    warned: bool
    largest: float = 0.0
    """||nu||, where it is watched."""


def lower_rule(job: Job, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Adam, except for a rule whose direction is the whole step."""
    if job.rule == "cg_on_v":
        return torch.optim.SGD(parameters, lr=1.0)
    return torch.optim.Adam(parameters, lr=lr)


def followed(
    job: Job, u: Tensor, v: Tensor, f: Loss, g: Loss, steps: int, score: Callable[[], float]
) -> End:
    """A deterministic run."""
    steps = max(1, int(job.share * steps))
    optimizer = PenaltyBilevelOptimizer(
        [u],
        lower_rule(job, [v], 0.1),
        upper_lr=0.1,
        lower_steps=5,
        warmup_steps=steps // 20,
        penalty=Stationarity(RULES[job.rule]()),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        try:
            optimizer.step(f, g)
        except NonFiniteError:
            return End(math.inf, math.nan, False)
        scheduler.step()
    end = score()
    cost = optimizer.metrics.gradient_evaluations / (5 * steps)
    return End(end if math.isfinite(end) else math.inf, cost, False)


def analytic(job: Job) -> End:
    """Final error."""
    name, options = ANALYTIC[job.problem]
    problem = testing.get(name, **options, seed=job.seed)
    lower = problem.lower_loss
    assert lower is not None
    start = problem.start(torch.Generator().manual_seed(job.seed))
    u, v = (t.clone().requires_grad_() for t in start)
    return followed(
        job,
        u,
        v,
        lambda: problem.upper_loss(u, v),
        lambda: lower(u, v),
        400,
        lambda: float(problem.error(u.detach(), v.detach())),
    )


def solved_on(f: Callable[..., Tensor], g: Callable[..., Tensor], u: Tensor, v: Tensor) -> float:
    """F after at most 500 L-BFGS iterations on g(u, .), which is strictly convex, from v."""
    v = v.detach().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = g(u, v)
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return float(f(u, v))


def digits(job: Job) -> End:
    """F on the lower level, solved on."""
    f, g = digits_l2.losses(job.seed)
    u = torch.full((64,), -7.0, requires_grad=True)
    v = torch.zeros(64, 10, requires_grad=True)
    return followed(
        job,
        u,
        v,
        lambda: f(u, v),
        lambda: g(u, v),
        300,
        lambda: solved_on(f, g, u.detach(), v),
    )


def cleaning(job: Job) -> End:
    """Area under the ROC curve of the learned weights, with minibatches."""
    problem = rows.make_problem(rows.mnist(job.data), job.seed)
    model = rows.make_model("linear", job.seed)
    logits = torch.zeros(len(problem.labels), requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [logits],
        lower_rule(job, list(model.parameters()), 1e-3),
        upper_lr=1e-1,
        penalty=Stationarity(RULES[job.rule]()),
    )
    generator = torch.Generator().manual_seed(job.seed)
    largest = 0.0
    steps = max(1, int(400 * job.share))
    for step in range(1, steps + 1):
        here, there = (
            torch.randperm(len(labels), generator=generator)[: rows.BATCH]
            for labels in (problem.labels, problem.clean_labels)
        )

        def upper(there: Tensor = there) -> Tensor:
            return cross_entropy(model(problem.clean_images[there]), problem.clean_labels[there])

        def lower(here: Tensor = here) -> Tensor:
            outputs = model(problem.images[here])
            losses = cross_entropy(outputs, problem.labels[here], reduction="none")
            return (logits[here].sigmoid() * losses).mean()

        try:
            optimizer.step(upper, lower)
        except NonFiniteError:
            return End(math.inf, math.nan, False, math.inf)
        if step % 100 == 0:
            largest = max(largest, float(rules.flat(optimizer.adjoint).norm()))
    cost = optimizer.metrics.gradient_evaluations / steps
    return End(rows.score(logits.detach().sigmoid(), problem)["auc"], cost, False, largest)


def run(job: Job) -> End:
    """One rule on one problem from one seed."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32 if job.problem == "mnist" else torch.float64)
    solve = {"digits": digits, "mnist": cleaning}.get(job.problem, analytic)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BilevelWarning)
        end = solve(job)
    # An exactly zero hypergradient is what a finished run has.
    alarms = [w for w in caught if "exactly zero" not in str(w.message)]
    return end._replace(warned=bool(alarms))


def cell(problem: str, ends: list[End]) -> str:
    """Scores of one rule on one problem."""
    scores = [end.score for end in ends]
    middle = statistics.median_high(scores)
    if problem == "mnist":
        text = f"{middle:.3f}, {max(end.largest for end in ends):.2g}"
    elif problem == "digits":
        text = f"{middle:.4f}"
    else:
        text = f"{middle:.0e}" + (f" / {max(scores):.0e}" if len(scores) > 1 else "")
    warned = sum(end.warned for end in ends)
    return text + (f" (warned {warned})" if warned else "")


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3, help="of the analytic problems (3)")
    parser.add_argument("--data", type=Path, default=rows.default_folder("mnist"), help="of MNIST")
    parser.add_argument("--share", type=float, default=1.0, help="of the upper steps (1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    options = parser.parse_args()
    jobs = [
        Job(rule, problem, seed, options.data, options.share)
        for problem in options.problems
        for rule in options.rules
        for seed in range(options.seeds if problem in ANALYTIC else 1)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        ends = dict(zip(jobs, tqdm(pool.map(run, jobs), total=len(jobs)), strict=True))
    print("\n| rule | cost | " + " | ".join(options.problems) + " |")
    print("|---|---|" + "---|" * len(options.problems))
    for rule in options.rules:
        mine = {
            problem: [end for job, end in ends.items() if job[:2] == (rule, problem)]
            for problem in options.problems
        }
        cost = next(iter(mine.values()))[0].cost
        cells = [cell(problem, found) for problem, found in mine.items()]
        print(f"| {rule} | {cost:.1f} | " + " | ".join(cells) + " |")
    print(
        f"\n{options.seeds} seeds; torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, 1 thread per run"
    )


if __name__ == "__main__":
    main()
