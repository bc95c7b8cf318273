"""One L2 weight per feature of a softmax regression, by every method with the same command.

    python examples/tune_l2.py --data newsgroups --method all      # table and picture
    python examples/tune_l2.py --data newsgroups --method penalty  # one method, same options
    python examples/tune_l2.py --data gas --method all --tune      # choose the knobs on the grid

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
default ends behind conjugate gradients: its multiplier takes steps of 1 / ||H||, too short for
the flat directions of H, and every one of its T lower steps costs three evaluations. Its
"running" loss is low because the multiplier's error pulls v towards f, not because u is good.
All methods chose the same corner of the grid on newsgroups: a larger one may reorder them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _data import UCI, default_folder
from _l2_problem import GLOBAL_WEIGHTS, Problem, lower_loss, make_problem, one_weight
from _record import Line, Record
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor
from tqdm import tqdm

from torch_penalty_bilevel import (
    HypergradientOptimizer,
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    ValueGap,
)
from torch_penalty_bilevel.constraints import Box

PENALTIES: dict[str, Callable[[], Stationarity | ValueGap]] = {
    "penalty": Stationarity,
    "penalty_no_pull": lambda: Stationarity(LeastSquares(share=0.0)),
    "value": ValueGap,
}
METHODS = (
    *PENALTIES,
    *("cg", "neumann", "fixed_point", "approx_grad", "reverse"),
    *("one_step", "alternating"),
)
ITERATIVE = ("cg", "neumann", "fixed_point", "approx_grad")
GRID = {"upper_lr": (0.03, 0.1), "lower_lr": (0.1, 0.3), "lower_steps": (1, 10)}
REVERSE_LOWER = {0.1: 0.5, 0.3: 1.0}  # gradient steps instead, in units of 1 / curvature
TUNING_SEED = 100
TUNED: dict[str, dict[str, tuple[float, float, int]]] = {
    # The corner of the grid for all that were tried; one_step and approx_grad follow the others.
    "newsgroups": {method: (0.1, 0.3, 10) for method in METHODS},
    "gas": {  # with --evaluations 400
        "penalty": (0.03, 0.3, 1),
        "penalty_no_pull": (0.03, 0.3, 1),
        "value": (0.03, 0.1, 1),
        "cg": (0.1, 0.1, 10),
        "neumann": (0.1, 0.3, 10),
        "fixed_point": (0.1, 0.3, 10),
        "approx_grad": (0.03, 0.1, 10),
        "reverse": (0.03, 0.1, 10),
        "one_step": (0.1, 0.1, 10),
    },
    "breastcancer": {  # with --evaluations 400
        "penalty": (0.1, 0.3, 1),
        "penalty_no_pull": (0.1, 0.3, 1),
        "value": (0.1, 0.1, 1),
        "cg": (0.1, 0.1, 1),
        "neumann": (0.1, 0.3, 1),
        "fixed_point": (0.1, 0.3, 1),
        "approx_grad": (0.1, 0.1, 1),
        "reverse": (0.1, 0.3, 1),
        "one_step": (0.1, 0.1, 1),
    },
}
LEAST = -4.0
RECORD = Path("results/tune_l2.jsonl")  # delete it when the code has changed

Optimizer = PenaltyBilevelOptimizer | HypergradientOptimizer


def make_optimizer(problem: Problem, u: Tensor, v: Tensor, setting: Line) -> Optimizer:
    """The optimizer of ``setting``: method, upper_lr, lower_lr, lower_steps."""
    method, lower_lr = setting["method"], setting["lower_lr"]
    common = {
        "upper_lr": setting["upper_lr"],
        "lower_steps": setting["lower_steps"],
        "curvature": "double_backward",  # "auto" trusts no custom product, this one is linear
        "upper_constraint": Box(LEAST, max(problem.largest, 0.0)),
    }
    if method in PENALTIES:
        penalty = PENALTIES[method]()
        return PenaltyBilevelOptimizer([u], [v], lower_lr=lower_lr, penalty=penalty, **common)
    # Cross entropy and L2 term curve by at most ``smoothness`` each.
    step = 1 / (2 * problem.smoothness)
    if method == "reverse":
        lower_lr = REVERSE_LOWER[lower_lr] * 2 * step
    elif method in ("neumann", "fixed_point", "one_step"):
        common["step_size"] = step
    if method in ITERATIVE:
        common["inner_iterations"] = setting["lower_steps"] + (method == "approx_grad")
    if method == "alternating":  # f does not depend on u directly, so it has nothing to follow
        common["allow_unused"] = True
    return HypergradientOptimizer([u], [v], method=method, lower_lr=lower_lr, **common)


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


def reached(path: list[Line], target: float, axis: str) -> float:
    """When the re-solved loss first fell to ``target``, linear between two moments; or inf."""
    for before, after in itertools.pairwise(path):
        if after["resolved"] <= target:
            fallen = before["resolved"] - after["resolved"]
            part = (before["resolved"] - target) / fallen if fallen > 0 else 1.0
            return before[axis] + min(max(part, 0.0), 1.0) * (after[axis] - before[axis])
    return math.inf


def table(results: dict[str, list[Line]], simple: list[Line]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    names = ["validation", "running", "test", "refit", "seconds", "seconds to target"]
    lines = ["| method | " + " | ".join([*names, "evaluations to target"]) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    targets = [_target([runs[i] for runs in results.values()]) for i in range(len(simple))]
    for name in simple[0]:
        cells = [_cell([row[name].get(n) for row in simple]) for n in names]
        lines.append(f"| {name} | " + " | ".join([*cells, ""]) + " |")
    for method, runs in results.items():
        cells = [_cell([run.get(n) for run in runs]) for n in names[:5]]
        for axis in ("seconds", "evaluations"):
            pairs = zip(runs, targets, strict=True)
            cells.append(_cell([reached(run.get("path", []), t, axis) for run, t in pairs]))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _target(runs: list[Line]) -> float:
    """1% of the best run's gain above its end."""
    best = min(runs, key=lambda run: run["validation"])
    return best["validation"] + 0.01 * (best["path"][0]["resolved"] - best["validation"])


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    texts = [_number(f(known)) for f in (statistics.median, min, max)]
    if texts[1] == texts[2]:
        return texts[0]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "never"
    return f"{value:.0f}" if value >= 100 else f"{value:.4f}" if value < 2 else f"{value:.2f}"


def draw(results: dict[str, list[Line]], simple: list[Line], title: str, path: Path) -> None:
    """Validation loss of the first seed against seconds and against evaluations."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    figure.suptitle(title)
    for index, (method, runs) in enumerate(results.items()):
        points = runs[0].get("path", [])[1:]
        style = {"color": f"C{index}", "linewidth": 2.5 if method == "penalty" else 1.2}
        for row, kind in zip(axes, ("resolved", "running"), strict=True):
            for axis, name in zip(row, ("seconds", "evaluations"), strict=True):
                xs, ys = ([point[key] for point in points] for key in (name, kind))
                axis.semilogx(xs, ys, ".-", markersize=4, label=method, **style)
    for row, kind in zip(axes, ("re-solved, f(v*(u))", "running, f(v)"), strict=True):
        row[0].set_ylabel(f"validation loss\n{kind}")
        start = next(run["path"][0]["resolved"] for runs in results.values() for run in runs[:1])
        level = simple[0]["one L2 weight"]["validation"]
        for axis in row:
            axis.axhline(level, color="black", linestyle=":", linewidth=1, label="one L2 weight")
            bottom = min(axis.get_ylim()[0], level - 0.1 * (start - level))
            axis.set_ylim(bottom, start + 0.15 * (start - bottom))
            axis.grid(alpha=0.3)
            axis.xaxis.set_minor_formatter(NullFormatter())
    axes[1, 0].set_xlabel("CPU seconds")
    axes[1, 1].set_xlabel("gradients and products")
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def settings_of(method: str, options: argparse.Namespace) -> list[Line]:
    """The grid with ``--tune``; else the knobs from the command line or the tuned ones."""
    if options.tune:
        grid = itertools.product(*GRID.values())
    else:
        default = TUNED.get(options.data, {}).get(method, (0.1, 0.1, 1))
        given = (getattr(options, name) for name in GRID)
        grid = iter([tuple(d if g is None else g for g, d in zip(given, default, strict=True))])
    knobs = [dict(zip(GRID, values, strict=True)) for values in grid]
    return [{"method": method, **setting} for setting in knobs]


def parse() -> argparse.Namespace:
    """The command line."""
    text = f"{__doc__}\nThe grid: {GRID}; lower rates of reverse: {REVERSE_LOWER}."
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def main() -> None:
    """Run what is not in the record yet; print and draw what is."""
    options = parse()
    torch.set_num_threads(options.threads)
    kind = "newsgroups" if options.data == "newsgroups" else "uci"
    folder = options.folder or default_folder("20newsgroups" if kind == "newsgroups" else kind)
    methods = METHODS if options.method == "all" else (options.method,)
    first, count = (TUNING_SEED, 1) if options.tune else (options.first_seed, options.seeds)
    seeds = range(first, first + count)
    sizes = {"features": options.features, "posts": options.posts} if kind == "newsgroups" else {}
    common = {"data": options.data, **sizes, "budget": options.evaluations}
    common["moments"] = 0 if options.tune else options.moments
    record = Record(options.record)
    runs: list[Line] = []
    for seed in seeds:  # the methods in turn, so that a busy machine is busy for all of them
        runs += [] if options.tune else [{"row": "baselines", **common, "seed": seed}]
        for method in methods:
            runs += [{**common, "seed": seed, **knobs} for knobs in settings_of(method, options)]
    perform([run for run in runs if run not in record], record, folder)
    rows = [run for run in runs if "row" in run]
    runs = [run for run in runs if "row" not in run]
    if options.tune:
        for method in methods:
            best = min(
                (run for run in runs if run["method"] == method),
                key=lambda run: record[run]["validation"],
            )
            knobs = tuple(best[name] for name in GRID)
            print(f'"{method}": {knobs},  # {record[best]["validation"]:.4f}')
        return
    results = {m: [record[run] for run in runs if run["method"] == m] for m in methods}
    simple = [record[run] for run in rows]
    print(table(results, simple))
    output = options.output or Path(f"results/tune_l2_{options.data}.png")
    draw(results, simple, f"{options.data}: L2 weight per feature, seed {seeds[0]}", output)
    print(f"picture: {output}")


if __name__ == "__main__":
    main()
