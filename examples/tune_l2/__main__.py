"""One L2 weight per feature of a softmax regression, by every method with the same command.

    python -m examples.tune_l2 --data newsgroups --method all      # table and picture
    python -m examples.tune_l2 --data newsgroups --method penalty  # one method, same options
    python -m examples.tune_l2 --data gas --method all --tune      # choose the knobs on the grid

u holds the log L2 weight of each of d features, v the coefficients (d x k classes):

    g(u, v) = cross entropy of the training rows + mean_jc exp(u_j) v_jc^2 / 2
    f(v)    = cross entropy of the validation rows

Data: 20 Newsgroups as TF-IDF (train and validation: 2,000 each of the training posts; test: the
7,532 later posts), or a UCI table whose target is above its median or not (thirds). u starts at
0, v at 0; u stays between -4 and the weight at which the L2 term curves as much as the cross
entropy can.

Every method has the same budget of gradients and second-order products, and the same three knobs:
Adam's learning rates of both levels and T, the lower steps per upper step (also the products of
those that solve a linear system). The grid is printed by ``--help``; knobs are chosen by
validation loss on seed 100, never on those reported, and written below (``neumann`` takes those of
``fixed_point``, the same iteration). ``reverse`` needs plain
gradient steps for v: its lower rates are in units of 1 / curvature. So are the steps of
``neumann``, ``fixed_point`` and ``one_step`` on their linear system.

Two validation losses: "running" at the v at hand, "re-solved" at v*(u), L-BFGS to the end; the
clock, of this process's CPU time, stands still meanwhile. Knobs, targets and the table go by the
second: a running v may be good because it was stopped early or was pulled towards f, not because
u is good.

The table: re-solved validation loss at the end; test accuracy of v*(u), and when it is fitted
again on training and validation rows ("refit"); when a method first reached the target: the
loss 1% of the best method's gain above the best method's end. Finished runs are lines of the
record and are not repeated.

What to read there: f sees as many validation posts as u has entries, so it falls while the test
accuracy falls below that of one L2 weight; stop early, or take more posts. On newsgroups the
default ends behind conjugate gradients: every one of its T lower steps costs three evaluations, and
u does not wait for v and the multiplier.
All methods chose the same corner of the grid on newsgroups: a larger one may reorder them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.data.mirrors import default_folder
from examples.data.uci import UCI
from examples.shared import command
from examples.shared.grid import print_best, settings
from examples.shared.record import Line, Record
from examples.tune_l2.methods import (
    GRID,
    METHODS,
    REVERSE_LOWER,
    TUNED,
    TUNING_SEED,
    make_optimizer,
)
from examples.tune_l2.problem import GLOBAL_WEIGHTS, Problem, lower_loss, make_problem, one_weight
from examples.tune_l2.report import draw, table
from torch_penalty_bilevel import NonFiniteError

RECORD = Path("results/tune_l2.jsonl")  # delete it when the code has changed


def tune(
    problem: Problem, setting: Line, budget: int, moments: int, tick: Callable[[int], object]
) -> Line:
    """Run one setting until ``budget`` evaluations; its path at ``moments`` of them, its end.

    Without moments (to choose knobs) only the validation loss at the end.
    """
    u, v = problem.start()
    optimizer = make_optimizer(problem, u, v, setting)
    marks = np.unique(np.geomspace(10, budget, moments).astype(int)).tolist() or [budget]
    seen: list[Moment] = [Moment(0.0, 0, u.detach().clone(), v.detach().clone())]
    seconds, count = 0.0, 0
    while count < budget:
        began = time.process_time()
        try:
            optimizer.step(
                lambda: problem.validation.loss(v), lambda: lower_loss(problem.train, u, v)
            )
        except NonFiniteError as error:
            return {"diverged": str(error), "validation": math.inf}
        seconds += time.process_time() - began
        tick(optimizer.metrics.gradient_evaluations - count)
        count = optimizer.metrics.gradient_evaluations
        if count >= marks[0]:
            seen.append(Moment(seconds, count, u.detach().clone(), v.detach().clone()))
            marks = [mark for mark in marks if mark > count] or [budget]
    if not moments:
        return {"validation": problem.validation.loss(problem.solved(u, v)).item()}
    return judged(problem, seen)


class Moment(NamedTuple):
    """A run, seen."""

    seconds: float
    evaluations: int
    u: Tensor
    v: Tensor


def judged(problem: Problem, seen: list[Moment]) -> Line:
    """The path with the lower level solved at each moment, and what the last u is worth."""
    path, best = [], seen[0].v
    for moment in seen:
        best = problem.solved(moment.u, best)
        running, resolved = (problem.validation.loss(v).item() for v in (moment.v, best))
        when = {"seconds": moment.seconds, "evaluations": moment.evaluations}
        path.append({**when, "running": running, "resolved": resolved})
    refit = problem.solved(seen[-1].u, best, problem.train.joined(problem.validation))
    return {
        "path": path,
        "validation": path[-1]["resolved"],
        "running": path[-1]["running"],
        "test": problem.test.accuracy(best),
        "refit": problem.test.accuracy(refit),
        "seconds": seen[-1].seconds,
    }


def baselines(problem: Problem) -> Line:
    """One L2 weight from a grid, and none."""
    rows = {}
    for name, weights in (("one L2 weight", GLOBAL_WEIGHTS), ("no L2", np.zeros(1))):
        v, row = one_weight(problem, weights)
        if row["weight"] > 0:
            u = torch.full((problem.features,), math.log(row["weight"]), dtype=problem.dtype)
            both = problem.train.joined(problem.validation)
            row["refit"] = problem.test.accuracy(problem.solved(u, v, both))
        rows[name] = row
    return rows


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; without baselines if it is to tune."""
    sizes = {"features": options.features, "posts": options.posts}
    common = {"data": options.data, **(sizes if options.data == "newsgroups" else {})}
    common |= {"budget": options.evaluations, "moments": 0 if options.tune else options.moments}
    tuned = TUNED.get(options.data, {})
    runs: list[Line] = []
    for seed in seeds_of(options):  # methods in turn: a busy machine is busy for all of them
        runs += [] if options.tune else [{"row": "baselines", **common, "seed": seed}]
        for method in methods_of(options):
            knobs = settings(method, GRID, tuned.get(method, (0.1, 0.1, 1)), options)
            runs += [{**common, "seed": seed, **setting} for setting in knobs]
    return runs


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds to report, or the one to tune on."""
    first, count = (TUNING_SEED, 1) if options.tune else (options.first_seed, options.seeds)
    return range(first, first + count)


def methods_of(options: argparse.Namespace) -> tuple[str, ...]:
    """One method or all of them."""
    return METHODS if options.method == "all" else (options.method,)


def perform(todo: list[Line], record: Record, folder: Path) -> None:
    """Run what is to be done, in order."""
    problem, shown = None, -1
    with tqdm(total=sum(r["budget"] for r in todo), file=sys.stderr, mininterval=1) as bar:
        for run in todo:
            if problem is None or run["seed"] != shown:
                shown = run["seed"]
                problem = make_problem(
                    run["data"], shown, folder, run.get("features", 0), run.get("posts", 0)
                )
                first = {"method": "penalty", **dict.fromkeys(GRID, 1)}
                tune(problem, first, 10, 0, lambda n: None)  # no run pays for torch's first use
            bar.set_description(run.get("method", "baselines"))
            if "row" in run:
                record.add(run, baselines(problem))
                bar.update(run["budget"])
            else:
                record.add(run, tune(problem, run, run["budget"], run["moments"], bar.update))


def parse() -> argparse.Namespace:
    """The command line."""
    text = f"{__doc__}\nThe grid: {GRID}; lower rates of reverse: {REVERSE_LOWER}."
    parser = command.parser(__spec__, text)
    add = parser.add_argument
    add("--data", choices=("newsgroups", *UCI), default="newsgroups", help="(newsgroups)")
    add("--method", choices=("all", *METHODS), default="penalty", help="(penalty)")
    add("--tune", action="store_true", help="try the grid on the tuning seed, print the best")
    add("--upper-lr", type=float, help="(tuned)")
    add("--lower-lr", type=float, help="(tuned)")
    add("--lower-steps", type=int, help="T (tuned)")
    add("--evaluations", type=int, default=1000, help="gradients and products per run (1000)")
    add("--features", type=int, default=2000, help="words of newsgroups (2000)")
    add("--posts", type=int, default=4000, help="posts of newsgroups to learn from (4000)")
    add("--seeds", type=int, default=2, help="number of seeds (2)")
    add("--first-seed", type=int, default=0, help="first of them (0)")
    add("--moments", type=int, default=10, help="points of a path (10)")
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--folder", type=Path, help="folder of the data (beside the checkout, or a cache)")
    add("--record", type=Path, default=RECORD, help=f"finished runs ({RECORD})")
    add("--output", type=Path, help="picture (results/tune_l2_DATA.png)")
    return parser.parse_args()


def main() -> None:
    """Run what is not in the record yet; print and draw what is."""
    options = parse()
    torch.set_num_threads(options.threads)
    kind = "20newsgroups" if options.data == "newsgroups" else "uci"
    runs, record, methods = planned(options), Record(options.record), methods_of(options)
    todo = [run for run in runs if run not in record]
    perform(todo, record, options.folder or default_folder(kind))
    if options.tune:
        print_best(methods, runs, record, GRID, by="validation")
        return
    simple = [record[run] for run in runs if "row" in run]
    results = {m: [record[run] for run in runs if run.get("method") == m] for m in methods}
    print(table(results, simple))
    output = options.output or Path(f"results/tune_l2_{options.data}.png")
    title = f"{options.data}: L2 weight per feature, seed {seeds_of(options)[0]}"
    draw(results, simple, title, output)
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
