"""Time to target on MNIST hyper-cleaning: this optimizer against torchopt, higher and no weights.

    python benchmarks/race.py                     # 5 seeds x 3 noise levels x 15 s: about an hour
    python benchmarks/race.py --quick             # does it run? one seed, one noise level, 1 s

The problem is that of ``cleaning.py`` with the MLP (784-300-10): a share of 5,000 labels drawn
anew, 1,000 clean images, u one logit per training image, batches of 200 for f and g.

Every method is tuned alike on one seed that is not among those reported, at noise 0.5: the best
test accuracy within the tuning time over the grid

    lower rate {1e-3, 3e-3} x upper rate {0.3, 1}    (Adam; "reverse" is SGD, lower rate x 100)

with one v-step per u-step, then the best pair again with five ("higher" keeps its own number).
All methods start from the same v and u = 0. The clock runs during training only; it is the CPU
time of the process, which other jobs on the machine disturb less than wall time (also recorded).

The targets of a seed are shares of the best test accuracy, or share of labels told right, that any
row but the oracle reaches. Accuracies are those of the running model on 10,000 test images, looked
at whenever the clock has grown by a quarter, so times are rounded up by at most that, or by one
step where that is longer. Every finished run is a line of the output file and is skipped when
found there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _mnist_rows import (
    Problem,
    accuracy,
    baselines,
    default_folder,
    make_problem,
    mnist,
    score,
)
from _race_methods import METHODS, Rates, Task
from _race_report import draw, print_tables
from _record import Line, Record
from tqdm import tqdm

from torch_penalty_bilevel import NonFiniteError

OUTPUT = Path("results/race.jsonl")  # delete it when the code has changed
LOWER, UPPER = (1e-3, 3e-3), (0.3, 1.0)
TUNING_SEED, TUNING_NOISE = 100, 0.5
TEST_IMAGES, FIRST_LOOK, GROWTH = 10_000, 0.2, 1.25


def run_for(method: str, rates: Rates, problem: Problem, seconds: float) -> Line:
    """One method for so many CPU seconds of training; what is seen on the way."""
    task = Task(problem)
    step = METHODS[method].start(task, rates)
    path, steps, cpu, wall, look = [], 0, 0.0, 0.0, FIRST_LOOK
    while cpu < seconds:
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        try:
            step()
        except NonFiniteError as error:
            return {"path": path, "steps": steps, "failed": f"step {steps + 1}: {error}"}
        cpu += time.process_time() - cpu_began
        wall += time.perf_counter() - wall_began
        steps += 1
        if cpu >= look or cpu >= seconds:
            look = max(look, cpu) * GROWTH
            if not all(t.isfinite().all() for t in (task.logits, *task.lower)):
                return {"path": path, "steps": steps, "failed": f"not finite by step {steps}"}
            path.append({"cpu": cpu, "wall": wall, "step": steps, **_seen(task)})
    return {"path": path, "steps": steps, "cpu": cpu, "wall": wall}


@torch.no_grad()
def _seen(task: Task) -> Line:
    problem = task.problem
    told = score(task.logits.detach().sigmoid(), problem)
    accurate = accuracy(task.model, problem.test_images, problem.test_labels)
    return {"accuracy": accurate, "told_right": told["told_right"], "auc": told["auc"]}


class Problems:
    """The problems by seed and noise level; the last one is kept."""

    def __init__(self, folder: Path) -> None:
        self.data = mnist(folder)
        self.last: tuple[tuple[int, float], Problem] | None = None

    def __call__(self, seed: int, noise: float) -> Problem:
        if self.last is None or self.last[0] != (seed, noise):
            problem = make_problem(self.data, seed, noise=noise)
            images, labels = (
                values[:TEST_IMAGES] for values in (problem.test_images, problem.test_labels)
            )
            self.last = (seed, noise), problem._replace(test_images=images, test_labels=labels)
        return self.last[1]


def tuned(method: str, seconds: float, once: Callable[[Line], Line]) -> Rates:
    """The rates, then the number of v-steps, with the best accuracy on the tuning seed."""
    scale, (few, *more) = METHODS[method].lower_lr_scale, METHODS[method].lower_steps
    found: dict[Rates, float] = {}

    def best() -> Rates:
        return max(found, key=lambda rates: found[rates])

    def attempt(rates: Rates) -> None:
        path = once(_run(method, rates, TUNING_SEED, TUNING_NOISE, seconds))["path"]
        found[rates] = max((seen["accuracy"] for seen in path), default=-math.inf)

    for low, up in itertools.product(LOWER, UPPER):
        attempt(Rates(low * scale, up, few))
    for steps in more:
        attempt(best()._replace(lower_steps=steps))
    return best()


def _run(method: str, rates: Rates, seed: int, noise: float, seconds: float) -> Line:
    return {"method": method, **rates._asdict(), "seed": seed, "noise": noise, "seconds": seconds}


def race(
    record: Record,
    problems: Problems,
    seeds: Sequence[int],
    noises: Sequence[float],
    seconds: float,
    tuning_seconds: float,
    methods: Sequence[str],
) -> dict[str, Rates]:
    """Tune, then every method and baseline for every seed and noise level; returns the rates."""
    tuning = sum(len(LOWER) * len(UPPER) + len(METHODS[name].lower_steps) - 1 for name in methods)
    total = tuning + len(seeds) * len(noises) * (1 + len(methods))
    with tqdm(total=total, file=sys.stderr) as bar:

        def once(run: Line) -> Line:
            if run not in record:
                bar.set_postfix_str(f"{run['method']}, seed {run['seed']}, noise {run['noise']}")
                problem = problems(run["seed"], run["noise"])
                if run["method"] == "baselines":
                    found: Line = baselines("mlp", problem)
                else:
                    rates = Rates(run["lower"], run["upper"], run["lower_steps"])
                    found = run_for(run["method"], rates, problem, run["seconds"])
                record.add(run, found)
            bar.update()
            return record[run]

        rates = {method: tuned(method, tuning_seconds, once) for method in methods}
        for seed, noise in itertools.product(seeds, noises):
            once({"method": "baselines", "seed": seed, "noise": noise})
            for method in methods:
                once(_run(method, rates[method], seed, noise, seconds))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (5)")
    parser.add_argument("--noises", type=float, nargs="+", default=(0.3, 0.5, 0.7))
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU seconds per run (15)")
    parser.add_argument("--tuning-seconds", type=float, default=8.0, help="... in tuning (8)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--early", type=float, default=5.0, help="time of the early score (5)")
    parser.add_argument("--quick", action="store_true", help="1 s, seed 0, noise 0.5 only")
    parser.add_argument(
        "--data", type=Path, default=default_folder("mnist"), help="folder of MNIST"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"finished runs ({OUTPUT})")
    parser.add_argument("--figure", type=Path, help="where to draw accuracy against time (nowhere)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    if options.quick:
        options.seeds, options.noises = 1, (0.5,)
        options.seconds, options.tuning_seconds, options.early = 1.0, 0.3, 0.3
    seeds, record = range(options.seeds), Record(options.output)
    rates = race(
        record,
        Problems(options.data),
        seeds,
        options.noises,
        options.seconds,
        options.tuning_seconds,
        options.methods,
    )

    def results(noise: float) -> dict[str, list[Line]]:
        return {
            method: [record[_run(method, rates[method], s, noise, options.seconds)] for s in seeds]
            for method in options.methods
        }

    def simple(noise: float) -> list[Line]:
        return [record[{"method": "baselines", "seed": s, "noise": noise}] for s in seeds]

    groups = {method: METHODS[method].group for method in options.methods}
    races = {noise: (results(noise), simple(noise)) for noise in options.noises}
    print_tables(races, rates, groups, options.early, options.seconds)
    if options.figure:
        draw(races, groups, options.figure)


if __name__ == "__main__":
    main()
