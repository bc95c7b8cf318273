"""One L2 weight per feature of a softmax regression, by every method with the same command.

    python -m examples.tune_l2                                  # newsgroups, by the penalty
    python -m examples.tune_l2 --method all                     # by every method, same budget
    python -m examples.tune_l2 --data gas --method all --tune   # choose the knobs on the grid

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
clock (CPU time; wall time on a GPU) stands still meanwhile. Knobs, targets and the table go by the
second: a running v may be good because it was stopped early or was pulled towards f, not because
u is good.

Rows that learn nothing: "one_weight", the best of a grid of L2 weights for all features, and
"no_l2".

The table: re-solved validation loss at the end; test accuracy of v*(u), and when it is fitted
again on training and validation rows ("refit"); when a method first reached the target: the
loss 1% of the best method's gain above the best method's end.

What to read there: f sees as many validation posts as u has entries, so it falls while the test
accuracy falls below that of one L2 weight; stop early, or take more posts. On newsgroups the
default ends behind conjugate gradients: every one of its T lower steps costs three evaluations, and
u does not wait for v and the multiplier.
All methods chose the same corner of the grid on newsgroups: a larger one may reorder them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from examples.data.mirrors import default_folder
from examples.data.uci import UCI
from examples.shared import command
from examples.shared.experiment import Experiment, by_method, by_seed
from examples.shared.grid import print_best, settings
from examples.shared.record import Line
from examples.shared.run import Run
from examples.tune_l2.methods import (
    GRID,
    METHODS,
    REVERSE_LOWER,
    TUNED,
    TUNING_SEED,
    make_optimizer,
)
from examples.tune_l2.problem import Problem, lower_loss, make_problem
from examples.tune_l2.report import draw, section
from examples.tune_l2.rows import ROWS, simple
from torch_penalty_bilevel import NonFiniteError

NAMES = (*ROWS, *METHODS)
SMOKE = {"features": 300, "posts": 400, "budget": 60, "moments": 3}


def tune(problem: Problem, setting: Line, budget: int, moments: int, run: Run) -> Line:
    """Run one setting until ``budget`` evaluations; its path at ``moments`` of them, its end.

    Without moments (to choose knobs) only the validation loss at the end.
    """
    u, v = problem.start()
    optimizer = make_optimizer(problem, u, v, setting)
    marks = np.unique(np.geomspace(10, budget, moments).astype(int)).tolist()
    count = [0]
    seen: list[Line] = [_moment(0.0, 0, u, v)]
    try:
        for step in run.until(budget, lambda: count[0], u, v, optimizer, count, seen):
            optimizer.step(
                lambda: problem.validation.loss(v), lambda: lower_loss(problem.train, u, v)
            )
            count[0] = optimizer.metrics.gradient_evaluations
            if count[0] >= min((m for m in marks if m > seen[-1]["evaluations"]), default=budget):
                with run.paused():
                    seen.append(_moment(run.seconds, count[0], u, v))
                    run.show(step, running=problem.validation.loss(v))
    except NonFiniteError as error:
        return {"diverged": str(error), "validation": math.inf}
    if not moments:
        return {"validation": problem.validation.loss(problem.solved(u, v)).item()}
    return judged(problem, seen)


def _moment(seconds: float, evaluations: int, u: torch.Tensor, v: torch.Tensor) -> Line:
    """A run, seen."""
    copies = {"u": u.detach().clone(), "v": v.detach().clone()}
    return {"seconds": seconds, "evaluations": evaluations, **copies}


def judged(problem: Problem, seen: list[Line]) -> Line:
    """The path with the lower level solved at each moment, and what the last u is worth."""
    path, best = [], seen[0]["v"]
    for moment in seen:
        best = problem.solved(moment["u"], best)
        running, resolved = (problem.validation.loss(v).item() for v in (moment["v"], best))
        when = {key: moment[key] for key in ("seconds", "evaluations")}
        path.append({**when, "running": running, "resolved": resolved})
    refit = problem.solved(seen[-1]["u"], best, problem.train.joined(problem.validation))
    return {
        "path": path,
        "validation": path[-1]["resolved"],
        "running": path[-1]["running"],
        "test": problem.test.accuracy(best),
        "refit": problem.test.accuracy(refit),
        "seconds": seen[-1]["seconds"],
        "evaluations": seen[-1]["evaluations"],
    }


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; without simple rows if it is to tune."""
    sizes = {"features": options.features, "posts": options.posts}
    common = {"data": options.data, **(sizes if options.data == "newsgroups" else {})}
    spent = {"budget": options.budget, "moments": 0 if options.tune else options.moments}
    tuned = TUNED.get(options.data, {})
    runs: list[Line] = []
    for seed in [TUNING_SEED] if options.tune else command.seeds_of(options):
        for name in command.methods_of(options, NAMES):
            if name in METHODS:
                knobs = settings(name, GRID, tuned.get(name, (0.1, 0.1, 1)), options)
                runs += [{**common, **spent, "seed": seed, **setting} for setting in knobs]
            elif not options.tune:
                runs.append({**common, "method": name, "seed": seed})
    return runs


class Work:
    """Does one run after another, on the data of its seed."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        kind = "20newsgroups" if options.data == "newsgroups" else "uci"
        self.folder, self.device = default_folder(kind, options.data_dir), device
        self._made: tuple[int, Problem] | None = None

    def problem(self, line: Line) -> Problem:
        """The data of a run; those of the last seed are kept."""
        if self._made is None or self._made[0] != line["seed"]:
            sizes = line.get("features", 0), line.get("posts", 0)
            problem = make_problem(
                line["data"], line["seed"], self.folder, *sizes, device=self.device
            )
            warm_up(problem)
            self._made = line["seed"], problem
        return self._made[1]

    def __call__(self, line: Line, run: Run) -> Line:
        """One row on one seed."""
        problem = self.problem(line)
        if line["method"] in ROWS:
            return simple(problem, ROWS[line["method"]])
        return tune(problem, line, line["budget"], line["moments"], run)


def warm_up(problem: Problem) -> None:
    """A few steps, so that no run pays for torch's first use."""
    u, v = problem.start()
    optimizer = make_optimizer(problem, u, v, {"method": "penalty", **dict.fromkeys(GRID, 1)})
    for _ in range(3):
        optimizer.step(lambda: problem.validation.loss(v), lambda: lower_loss(problem.train, u, v))


def parse() -> argparse.Namespace:
    """The command line."""
    text = f"{__doc__}\nThe grid: {GRID}; lower rates of reverse: {REVERSE_LOWER}."
    parser = command.parser(__spec__, text)
    add = parser.add_argument
    add("--data", choices=("newsgroups", *UCI), default="newsgroups", help="(newsgroups)")
    add("--tune", action="store_true", help="try the grid on the tuning seed, print the best")
    add("--upper-lr", type=command.rate, help="(tuned)")
    add("--lower-lr", type=command.rate, help="(tuned)")
    add("--lower-steps", type=command.count, help="T (tuned)")
    add("--features", type=command.count, default=2000, help="words of newsgroups (2000)")
    add(
        "--posts",
        type=command.count,
        default=4000,
        help="posts of newsgroups to learn from (4000)",
    )
    add("--moments", type=command.count, default=10, help="points of a path (10)")
    command.add_common(parser, NAMES, (*ROWS, "penalty"), 1000, "gradients and products", seeds=2)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment, plan = Experiment("tune_l2", options), planned(options)
    work = Work(options, experiment.device)
    if options.tune:
        experiment.perform(plan, work)
        methods = [name for name in command.methods_of(options, NAMES) if name in METHODS]
        print_best(methods, plan, experiment.record, GRID, by="validation")
        return
    title = f"{options.data}: L2 weight per feature, seed {plan[0]['seed']}"

    def picture(content: Line, path: Path) -> bool:
        return draw(by_method(content["runs"]), title, path)

    experiment.report(by_seed(plan), work, picture, section)


if __name__ == "__main__":
    main()
