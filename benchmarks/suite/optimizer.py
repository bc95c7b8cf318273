"""``PenaltyBilevelOptimizer`` on the analytic problems of ``torch_penalty_bilevel.testing``.

    python -m benchmarks.suite.optimizer        # the table of benchmarks/README.md
    python -m benchmarks.suite.optimizer feature_ridge --beta2 0.9 --schedule linear

One configuration for all: Adam at --lr on both levels, 5 lower steps per upper step, a warm-up of
at most 50, cosine decay to zero; float64. Per problem the worst over random starts of: error
(distance to the nearest solution over max(1, ||solution||)), gap f - f*, certificate ||a||,
a = grad_v f + H q, residual ||r||, hypergradient, and g(u, v) - g(u, v*(u)); then the
least curvature of u -> f(u, v*(u)) at the solution and how the runs ended:

    solved        error <= 1e-6, or 1e-3 where the lower level is singular or no u is optimal
    warned        the optimizer raised, or warned of more than an exactly zero hypergradient
    certificate   ||a|| or ||r|| > 1e-6: v or the multiplier has not settled, and it shows
    moving        the hypergradient that feasible motion can follow is > 1e-6: u has not settled
    not minimal   all of these are small, but another v has a smaller g
    stationary    nothing is wrong but the error: a local solution, or u so flat that f is reached
"""

from __future__ import annotations

import collections
import math
import os
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.suite.minimizer import lower_loss
from examples.shared import command
from torch_penalty_bilevel import BilevelWarning, NonFiniteError, PenaltyBilevelOptimizer, testing
from torch_penalty_bilevel.constraints import Box, Inequality

LOWER_STEPS = 5
SMALL = 1e-6
DECAY: dict[str, Callable[[float], float]] = {  # of the share of the run that is over
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "exponential": lambda t: 10 ** (-6 * t),
}


class Job(NamedTuple):
    """What defines a run."""

    name: str
    seed: int
    steps: int
    lr: float
    schedule: str
    beta2: float
    trace: bool = False


class End(NamedTuple):
    """How a run ended; norms are Euclidean."""

    error: float
    gap: float
    reached: float
    """Lower steps to an error of 1e-6; infinite where it was never reached."""
    certificate: float
    residual: float
    hypergradient: float
    depth: float
    """g(u, v) - g(u, v*(u))."""
    verdict: str


def restriction(
    box: testing.protocol.Bounds | None, h: testing.protocol.Loss | None, u: Tensor, v: Tensor
) -> list[Any]:
    """A level's constraints, on the live u and v."""
    parts = [] if box is None else [Box(*box)]
    return parts if h is None else [*parts, Inequality(lambda: h(u, v))]


def is_target(problem: testing.Problem, error: float) -> bool:
    """Is this error small enough for the kind of problem?"""
    return error <= (1e-3 if problem.tags & {"singular", "unattained"} else 1e-6)


class Trace:
    """Where the first entry of u went, a line per tenth of the run."""

    def __init__(self, job: Job, problem: testing.Problem) -> None:
        self.job, self.origin = job, float(problem.solutions[0][0][0])
        self.seen: list[float] = []

    def add(self, u: Tensor, optimizer: PenaltyBilevelOptimizer) -> None:
        self.seen.append(float(u.detach()[0]) - self.origin)
        if len(self.seen) % max(1, self.job.steps // 10):
            return
        part = self.seen[-max(1, self.job.steps // 10) :]
        held = {k: [t.tolist() for t in z] for k, z in optimizer.inequality_multipliers.items()}
        print(
            f"{self.job.name} start {self.job.seed} step {len(self.seen)}: u_1 - u*_1 from "
            f"{min(part):.1e} to {max(part):.1e}, {sum(x < 0 for x in part)} of {len(part)} below "
            f"0; hypergradient {u.grad.tolist() if u.grad is not None else ''}; multipliers {held}"
        )


def run(job: Job) -> End:
    """One start."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    problem = testing.get(job.name)
    u, v = problem.start(torch.Generator().manual_seed(job.seed))
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    optimizer = PenaltyBilevelOptimizer(
        [u],
        [v],
        upper_lr=job.lr,
        lower_lr=job.lr,
        lower_steps=LOWER_STEPS,
        warmup_steps=50,
        upper_constraint=restriction(problem.upper_box, problem.h_upper, u, v) or None,
        lower_constraint=restriction(problem.lower_box, problem.h_lower, u, v) or None,
    )
    for group in optimizer.upper.param_groups:
        group["betas"] = (0.9, job.beta2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: DECAY[job.schedule](k / job.steps)
    )

    def error() -> float:
        return float(problem.error(u.detach(), v.detach()))

    reached, raised = math.inf, False
    trace = Trace(job, problem) if job.trace else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BilevelWarning)
        for k in range(1, job.steps + 1):
            try:
                optimizer.step(lambda: problem.upper_loss(u, v), lambda: lower_loss(problem, u, v))
            except NonFiniteError:
                raised = True
                break
            scheduler.step()
            if trace is not None:
                trace.add(u, optimizer)
            if reached == math.inf and error() <= 1e-6:
                reached = k * LOWER_STEPS
    # An exactly zero hypergradient is what a finished run has; that warning is no alarm here.
    alarms = [w for w in caught if "exactly zero" not in str(w.message)]
    alarmed = raised or bool(alarms)
    return judged(problem, u.detach(), v.detach(), optimizer, reached, alarmed)


def judged(
    problem: testing.Problem,
    u: Tensor,
    v: Tensor,
    optimizer: PenaltyBilevelOptimizer,
    reached: float,
    alarmed: bool,
) -> End:
    """The last point measured against what is known of the problem."""
    seen = optimizer.metrics
    certificate, residual = float(seen.adjoint_residual_norm), float(seen.residual_norm)
    hypergradient = float(seen.upper_grad_norm)
    error = float(problem.error(u, v))
    depth = float(lower_loss(problem, u, v) - lower_loss(problem, u, problem.best_lower(u)))
    tests = {
        "solved": is_target(problem, error),
        "warned": alarmed,
        "certificate": max(certificate, residual) > SMALL,
        "moving": hypergradient > SMALL,
        "not minimal": depth > SMALL,
        "stationary": True,
    }
    verdict = next(name for name, holds in tests.items() if holds)
    gap = float(problem.upper_loss(u, v)) - problem.optimal_value
    return End(error, gap, reached, certificate, residual, hypergradient, depth, verdict)


def least_curvature(problem: testing.Problem) -> str:
    """Least |eigenvalue| of the Hessian of u -> f(u, v*(u)) at a smooth, unique solution."""
    if problem.tags & {"constrained", "many_solutions", "unattained", "singular"}:
        return ""
    hessian = torch.func.hessian(problem.hyperobjective)(problem.solution()[0])
    return f"{float(torch.linalg.eigvalsh(hessian).abs().min()):.0e}"


def row(name: str, ends: list[End]) -> str:
    """A line of the table."""
    worst = [max(column) for column in zip(*(end[:-1] for end in ends), strict=True)]
    error, gap, _, *rest = (f"{value:.1e}" for value in worst)
    steps = statistics.median_high([end.reached for end in ends])
    verdicts = collections.Counter(end.verdict for end in ends).most_common()
    cells = [
        name,
        error,
        gap,
        f"{steps:.0f}" if steps < math.inf else "",
        *rest,
        least_curvature(testing.get(name)),
        ", ".join(f"{verdict} {n}" for verdict, n in verdicts),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("names", nargs="*", help="problems; default: all")
    parser.add_argument("--starts", type=int, default=3, help="random starts per problem (3)")
    parser.add_argument("--steps", type=int, default=2000, help="upper steps (2000)")
    parser.add_argument("--lr", type=float, default=0.1, help="of both levels (0.1)")
    parser.add_argument("--schedule", choices=DECAY, default="cosine")
    parser.add_argument("--beta2", type=float, default=0.999, help="Adam's, for u (0.999)")
    parser.add_argument("--trace", action="store_true", help="print where u goes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as every run's process does
    torch.set_default_dtype(torch.float64)
    names = options.names or list(testing.names())
    settings = options.steps, options.lr, options.schedule, options.beta2, options.trace
    jobs = [Job(name, seed, *settings) for name in names for seed in range(options.starts)]
    with ProcessPoolExecutor(options.jobs) as pool:
        ends = list(tqdm(pool.map(run, jobs), total=len(jobs), unit="run"))
    print(
        "\n| problem | error | f - f* | lower steps to 1e-6 | ‖a‖ | ‖r‖ | hypergradient "
        "| g - min g | upper curvature | ends |"
    )
    print("|" + "---|" * 10)
    for name in names:
        print(row(name, [e for job, e in zip(jobs, ends, strict=True) if job.name == name]))
    print(f"\n{options.starts} starts each; {command.machine()} per run")


if __name__ == "__main__":
    main()
