"""Time to target on three problems: this optimizer against torchopt, higher and simple rows.

    python -m benchmarks.race                     # MNIST: 5 seeds x 3 noise levels, about an hour
    python -m benchmarks.race --problem l2        # an L2 weight per word of 20 Newsgroups
    python -m benchmarks.race --problem omniglot  # a representation for 5-way 1-shot tasks
    python -m benchmarks.race --quick             # does it run? one seed, 1 s

The problems are described in ``mnist.py``, ``l2.py`` and ``omniglot.py``.

Every method is tuned alike on seed 100, which is not among those reported: the best first score
(test accuracy, gain, test accuracy) within the tuning time over the grid

GRIDS

The rates are Adam's; those of "reverse", which takes gradient steps on v, are the second row. All
pairs are tried with the first number of v-steps per u-step, then the best pair with the others
("higher" keeps its own number). All methods start from the same v and u. The clock runs during
training only; it is the CPU time of the process, which other jobs on the machine disturb less than
wall time (also recorded).

The targets of a seed are shares of the best score that any row but the oracle reaches. Scores are
looked at whenever the clock has grown by a quarter (l2: by half), so times are rounded up by at
most that, or by one step where that is longer. Every finished run is a line of the output file and
is skipped when found there.
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
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.race.l2 import GRID as L2_GRID
from benchmarks.race.l2 import l2_race
from benchmarks.race.mnist import GRID as MNIST_GRID
from benchmarks.race.mnist import mnist_race
from benchmarks.race.omniglot import GRID as OMNIGLOT_GRID
from benchmarks.race.omniglot import omniglot_race
from benchmarks.race.problem import Problem
from benchmarks.race.report import draw, print_tables
from examples.shared import command
from examples.shared.record import Line, Record
from examples.shared.task import Rates
from torch_penalty_bilevel import NonFiniteError

OUTPUT = Path("results/race.jsonl")  # delete it when the code has changed
GRIDS = {"mnist": MNIST_GRID, "l2": L2_GRID, "omniglot": OMNIGLOT_GRID}
FIRST_LOOK = 0.2


class Length(NamedTuple):
    """How long to race on a problem, in CPU seconds, and how often."""

    seconds: float
    tuning_seconds: float
    early: float
    seeds: int


LENGTHS = {
    "mnist": Length(15.0, 8.0, 5.0, 5),
    "l2": Length(12.0, 4.0, 3.0, 3),
    "omniglot": Length(12.0, 3.0, 3.0, 3),
}


def run_for(method: str, rates: Rates, problem: Problem, data: Any, seconds: float) -> Line:
    """One method for so many CPU seconds of training; what is seen on the way."""
    task = problem.start(data)
    step = problem.methods[method].start(task, rates).step
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
            look = max(look, cpu) * problem.growth
            if not all(t.isfinite().all() for t in (*task.upper, *task.lower)):
                return {"path": path, "steps": steps, "failed": f"not finite by step {steps}"}
            path.append({"cpu": cpu, "wall": wall, "step": steps, **problem.look(task)})
    return {"path": path, "steps": steps, "cpu": cpu, "wall": wall}


class Data:
    """The data by condition and seed; the last are kept."""

    def __init__(self, make: Callable[[Line], Any]) -> None:
        self.make = make
        self.last: tuple[Line, Any] | None = None

    def __call__(self, condition: Line) -> Any:
        if self.last is None or self.last[0] != condition:
            self.last = condition, self.make(condition)
        return self.last[1]


def tuned(method: str, problem: Problem, seconds: float, once: Callable[[Line], Line]) -> Rates:
    """The rates, then the number of v-steps, with the best first score on the tuning seed."""
    few, *more = problem.methods[method].lower_steps
    main, found = next(iter(problem.scores)), dict[Rates, float]()

    def best() -> Rates:
        return max(found, key=lambda rates: found[rates])

    def attempt(rates: Rates) -> None:
        path = once(_run(method, rates, problem.tuning, seconds))["path"]
        found[rates] = max((seen[main] for seen in path), default=-math.inf)

    for low, up in itertools.product(problem.methods[method].lower, problem.upper):
        attempt(Rates(low, up, few))
    for steps in more:
        attempt(best()._replace(lower_steps=steps))
    return best()


def _run(method: str, rates: Rates, condition: Line, seconds: float) -> Line:
    return {"method": method, **rates._asdict(), **condition, "seconds": seconds}


def _condition(run: Line) -> Line:
    """What of a run says what its data are."""
    own = {"method", "seconds", *Rates._fields}
    return {name: value for name, value in run.items() if name not in own}


def race(
    record: Record,
    problem: Problem,
    seeds: Sequence[int],
    seconds: float,
    tuning_seconds: float,
    methods: Sequence[str],
) -> dict[str, Rates]:
    """Tune, then every method and baseline for every seed and condition; returns the rates."""
    chosen = [problem.methods[name] for name in methods]
    tuning = sum(len(m.lower) * len(problem.upper) + len(m.lower_steps) - 1 for m in chosen)
    total = tuning + len(seeds) * len(problem.conditions) * (1 + len(methods))
    data = Data(problem.make)
    with tqdm(total=total, file=sys.stderr) as bar:

        def once(run: Line) -> Line:
            if run not in record:
                condition = _condition(run)
                bar.set_postfix_str(f"{run['method']}, {condition}")
                if run["method"] == "baselines":
                    found = problem.baselines(data(condition))
                else:
                    rates = Rates(run["lower"], run["upper"], run["lower_steps"])
                    found = run_for(run["method"], rates, problem, data(condition), run["seconds"])
                record.add(run, found)
            bar.update()
            return record[run]

        rates = {method: tuned(method, problem, tuning_seconds, once) for method in methods}
        for seed, condition in itertools.product(seeds, problem.conditions.values()):
            here = {**condition, "seed": seed}
            once({"method": "baselines", **here})
            for method in methods:
                once(_run(method, rates[method], here, seconds))
    return rates


def _grids() -> str:
    """For --help."""
    rows = []
    for name, grid in GRIDS.items():
        rows.append(f"    {name:9} lower rate {grid.lower}, upper rate {grid.upper},")
        rows.append(f"              v-steps {grid.lower_steps}; reverse: {grid.gradient}")
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    """The command line; what was not said is that of the problem."""
    text = (__doc__ or "").replace("GRIDS", _grids())
    parser = command.parser(__spec__, text)
    add = parser.add_argument
    said = "; ".join(f"{name} {tuple(length)}" for name, length in LENGTHS.items())
    add("--problem", choices=GRIDS, default="mnist", help="(mnist)")
    add("--noises", type=float, nargs="+", default=(0.3, 0.5, 0.7), help="of mnist")
    add("--seconds", type=float, help="CPU seconds per run, the next three likewise by problem:")
    add("--tuning-seconds", type=float, help="... in tuning")
    add("--early", type=float, help="time of the early score")
    add("--seeds", type=int, help=f"number of seeds, from 0 ({said})")
    add("--methods", nargs="+", help="names as in the tables (all)")
    add("--quick", action="store_true", help="1 s, seed 0, of mnist noise 0.5 only")
    add("--data", type=Path, help="folder of the data (beside the checkout, or a cache)")
    add("--output", type=Path, default=OUTPUT, help=f"finished runs ({OUTPUT})")
    add("--figure", type=Path, help="where to draw the first score against time (nowhere)")
    add("--threads", type=int, default=1, help="torch threads (1)")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.noises = 1, (0.5,)
        options.seconds, options.tuning_seconds, options.early = 1.0, 0.3, 0.3
    for name, value in LENGTHS[options.problem]._asdict().items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    make: dict[str, Callable[[], Problem]] = {
        "mnist": lambda: mnist_race(options.data, tuple(options.noises)),
        "l2": lambda: l2_race(options.data),
        "omniglot": lambda: omniglot_race(options.data),
    }
    problem, record = make[options.problem](), Record(options.output)
    methods = options.methods or list(problem.methods)
    if unknown := set(methods) - {*problem.methods}:
        raise SystemExit(f"no methods {sorted(unknown)}; there are {list(problem.methods)}")
    seeds, seconds = range(options.seeds), options.seconds
    rates = race(record, problem, seeds, seconds, options.tuning_seconds, methods)
    races = {}
    for title, condition in problem.conditions.items():
        here = [{**condition, "seed": seed} for seed in seeds]
        results = {m: [record[_run(m, rates[m], c, seconds)] for c in here] for m in methods}
        races[title] = results, [record[{"method": "baselines", **c}] for c in here]
    print_tables(races, rates, problem, options.early, seconds)
    if options.figure:
        draw(races, problem, options.figure)


if __name__ == "__main__":
    main()
