"""Data and performance profiles: the share of problems solved against evaluations.

    python -m benchmarks.profiles  # the tables and the picture of benchmarks/README.md
    python -m benchmarks.profiles --problems smd23 digits --solvers default cg --seeds 1

Solvers, all from the same starts (see ``solvers.py``):

SOLVERS

Problems: all of ``torch_penalty_bilevel.testing`` but those with constraints, which few of the
solvers take, and four on data (see ``tables.py``); one whose data is missing is skipped, with a
message. Left out are

LEFT_OUT

One evaluation is a gradient of f, a gradient of g (or a value of the map) or a second-order product
with g's derivatives, forward or backward, counted alike for all: by ``metrics``, by
``MinimizeResult.evaluations`` (there what differentiates g three times counts two), by
``LocalProblem.evaluations``. Lower steps, inner solves and unrolled steps are in it, the first
step's check of dependences is not.

Solved at accuracy tau: F(u) - F* <= tau (F(u_0) - F*) (Moré & Wild, 2009). F(u) = f(u, v*(u)) with
the lower level solved again at u, in closed form or by L-BFGS, so that a v which is no lower
solution cannot pass; where g leaves v free, f is taken at the lower solution nearest to the
solver's v. F* is the known optimum, on data the best that any run of the file of results saw, one
of ``minimize`` with five times the budget among them. F is looked at whenever the evaluations have
grown by 1.3: counts are rounded up by at most that, or by one step.

Rates: Adam on both levels (upper, lower) in {0.3, 0.1}^2; plain gradient steps on v ("reverse",
"forward") 1 and 0.3 over the largest curvature at the start; all decay with the share of
the budget that is spent, as half a cosine. Each solver gets ONE setting for all problems: the
one that solves most of the tuning problems from seed 100, which is not reported:

TUNING

Failures are kept. A raised error or a u that is not finite ends a run; what was solved before
counts. "Warned" is a run that did not solve and warned of something.

Data profile (Moré & Wild, 2009): the share solved within so many evaluations. Performance profile
(Dolan & Moré, 2002): within so many times the evaluations of the best solver of that problem and
seed. A run that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.profiles import report
from benchmarks.profiles.arithmetic import best_known, cost, one_setting
from benchmarks.profiles.problems import LEFT_OUT, PROBLEMS, instance
from benchmarks.profiles.solvers import EXTRA, SOLVERS, Rates
from benchmarks.profiles.trial import ACCURACIES, Trial, run
from examples.data.mirrors import BESIDE
from examples.shared import command
from examples.shared.record import Line, Record

RESULTS = Path("results/profiles.jsonl")  # delete it when the code has changed
TUNING = ("quadratic", "weighted_cleaning", "least_squares")
TUNING_SEED = 100
REFERENCE = 5  # budgets


def available(names: Sequence[str], data: Path) -> list[str]:
    """Those whose data is there; says which are not."""
    found = []
    for name in names:
        try:
            instance(name, 0, data)
        except FileNotFoundError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def finished(record: Record, trials: Sequence[Trial], data: Path, jobs: int) -> None:
    """Run what the record lacks."""
    left = [trial for trial in trials if trial.line not in record]
    with (
        ProcessPoolExecutor(jobs) as pool,
        tqdm(total=len(trials), initial=len(trials) - len(left), unit="run") as bar,
    ):
        waiting = {pool.submit(run, trial, data): trial for trial in left}
        for future in as_completed(waiting):
            trial = waiting[future]
            record.add(trial.line, future.result())
            bar.set_postfix_str(f"{trial.solver}, {trial.problem}")
            bar.update()


def references(problems: Sequence[str], seeds: Sequence[int], budget: int) -> list[Trial]:
    """Long runs, for F* on data; of no other use."""
    (rates,) = SOLVERS["minimize"].rates
    places = [(name, seed) for name in problems for seed in seeds]
    return [Trial("minimize", rates, *place, REFERENCE * budget) for place in places]


def bests(record: Record, problems: Sequence[str], seeds: Sequence[int]) -> dict[tuple, float]:
    """F* by problem and seed, from all that the file of results knows."""
    places = {(name, seed): list[Line]() for name in problems for seed in seeds}
    for line, result in record.runs():
        place = line["problem"], line["seed"]
        if place in places:
            places[place].append(result)
    return {place: best_known(results) for place, results in places.items()}


def settings(record: Record, options: argparse.Namespace, problems: list[str]) -> dict[str, Rates]:
    """The rates of each solver."""
    trials = {
        (name, rates): [Trial(name, rates, p, TUNING_SEED, options.budget) for p in problems]
        for name in options.solvers
        for rates in SOLVERS[name].rates
        if len(SOLVERS[name].rates) > 1
    }
    rest = references(problems, [TUNING_SEED], options.budget) if trials else []
    everything = [*rest, *(trial for row in trials.values() for trial in row)]
    finished(record, everything, options.data, options.jobs)
    best = bests(record, problems, [TUNING_SEED]) if trials else {}
    chosen = {}
    for name in options.solvers:
        costs = {
            rates: [
                cost(record[trial.line], best[trial.problem, TUNING_SEED], accuracy)
                for trial in trials.get((name, rates), [])
                for accuracy in ACCURACIES
            ]
            for rates in SOLVERS[name].rates
        }
        chosen[name] = one_setting(costs, options.budget)
    return chosen


def parse() -> argparse.Namespace:
    """The command line."""
    text = __doc__ or ""
    for word, names in {"SOLVERS": SOLVERS, "LEFT_OUT": LEFT_OUT, "TUNING": TUNING}.items():
        lines = textwrap.indent(textwrap.fill(", ".join(names), 96), "    ")
        text = text.replace(f"\n{word}\n", f"\n{lines}\n")
    parser = command.parser(__spec__, text)
    add = parser.add_argument
    of = {"nargs": "+", "metavar": "NAME"}
    usual = [name for name in SOLVERS if name not in EXTRA]
    add("--solvers", choices=SOLVERS, default=usual, help=f"as above (all but {EXTRA})", **of)
    add("--problems", choices=PROBLEMS, default=list(PROBLEMS), help="(all)", **of)
    add("--tuning", choices=PROBLEMS, default=list(TUNING), help="to tune on (see above)", **of)
    add("--seeds", type=int, default=3, help="starts and splits, from 0 (3)")
    add("--budget", type=int, default=1500, help="evaluations per run (1500)")
    add("--data", type=Path, default=BESIDE, help="folder of the data (beside the checkout)")
    add("--results", type=Path, default=RESULTS, help=f"file of finished runs ({RESULTS})")
    add("--picture", type=Path, help="where to draw the profiles (nowhere)")
    add("--jobs", type=int, default=1, help="processes (1)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    record, seeds = Record(options.results), range(options.seeds)
    rates = settings(record, options, available(options.tuning, options.data))
    problems = available(options.problems, options.data)
    places = [(problem, seed) for problem in problems for seed in seeds]
    trials = {
        name: [Trial(name, rates[name], *place, options.budget) for place in places]
        for name in options.solvers
    }
    everything = references(problems, seeds, options.budget)
    everything += [trial for row in trials.values() for trial in row]
    everything.sort(key=lambda trial: trial.seed)  # a run cut off has its first seeds complete
    finished(record, everything, options.data, options.jobs)
    best = bests(record, problems, seeds)
    results = {name: [record[trial.line] for trial in row] for name, row in trials.items()}
    found = report.Found(
        places=places,
        results=results,
        costs={
            accuracy: {
                name: [cost(r, best[p], accuracy) for r, p in zip(row, places, strict=True)]
                for name, row in results.items()
            }
            for accuracy in ACCURACIES
        },
        best=[best[place] for place in places],
        rates=rates,
        budget=options.budget,
    )
    report.print_tables(found)
    if options.picture:
        report.draw(found, options.picture)
    print(f"\n{len(places)} problems ({options.seeds} seeds); {command.machine()} per run")


if __name__ == "__main__":
    main()
