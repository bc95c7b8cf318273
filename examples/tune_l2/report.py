"""The table and the picture of ``tune_l2``."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread

NAMES = ("validation", "running", "test", "refit", "seconds")


def section(content: Line) -> str:
    """The page of one results.json: what was run, and the table."""
    runs = content["runs"]
    run = next((r["run"] for r in runs if "budget" in r["run"]), runs[0]["run"])
    sizes = f" ({run['features']:,} words, {run['posts']:,} posts)" if "posts" in run else ""
    spent = f", {run['budget']:,} gradients and products" if "budget" in run else ""
    return f"{run['data']}{sizes}{spent}.\n\n{table(by_method(runs))}"


def table(results: dict[str, list[Line]]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    header = ["method", *NAMES, "seconds to target", "evaluations to target"]
    learned = {name: runs for name, runs in results.items() if "weight" not in runs[0]}
    targets = [_target(list(of_seed)) for of_seed in zip(*learned.values(), strict=True)]
    rows = {}
    for method, runs in results.items():
        rows[method] = [_cell([run.get(n) for run in runs]) for n in NAMES]
        for axis in ("seconds", "evaluations"):
            pairs = zip(runs, targets, strict=True) if method in learned else ()
            rows[method].append(_cell([reached(run.get("path", []), t, axis) for run, t in pairs]))
    return markdown(header, rows)


def reached(path: list[Line], target: float, axis: str) -> float:
    """When the re-solved loss first fell to ``target``, linear between two moments; or inf."""
    for before, after in itertools.pairwise(path):
        if after["resolved"] <= target:
            fallen = before["resolved"] - after["resolved"]
            part = (before["resolved"] - target) / fallen if fallen > 0 else 1.0
            return before[axis] + min(max(part, 0.0), 1.0) * (after[axis] - before[axis])
    return math.inf


def _target(runs: list[Line]) -> float:
    """1% of the best run's gain above its end."""
    best = min(runs, key=lambda run: run["validation"])
    if "path" not in best:  # all have diverged
        return -math.inf
    return best["validation"] + 0.01 * (best["path"][0]["resolved"] - best["validation"])


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known if len(known) == len(values) else [], _number)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "never"
    return f"{value:.0f}" if value >= 100 else f"{value:.4f}" if value < 2 else f"{value:.2f}"


def draw(results: dict[str, list[Line]], title: str, path: Path) -> bool:
    """Validation loss of the first seed against seconds and evaluations; False: there is none."""
    paths = {method: runs[0]["path"] for method, runs in results.items() if "path" in runs[0]}
    if not paths:
        return False
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    figure.suptitle(title)
    for index, (method, points) in enumerate(paths.items()):
        style = {"color": f"C{index}", "linewidth": 2.5 if method == "penalty" else 1.2}
        for row, kind in zip(axes, ("resolved", "running"), strict=True):
            for axis, name in zip(row, ("seconds", "evaluations"), strict=True):
                xs, ys = ([point[key] for point in points[1:]] for key in (name, kind))
                axis.semilogx(xs, ys, ".-", markersize=4, label=method, **style)
    start = next(iter(paths.values()))[0]["resolved"]
    level = results["one_weight"][0]["validation"] if "one_weight" in results else start
    for row, kind in zip(axes, ("re-solved, f(v*(u))", "running, f(v)"), strict=True):
        row[0].set_ylabel(f"validation loss\n{kind}")
        for axis in row:
            if "one_weight" in results:
                axis.axhline(level, color="black", linestyle=":", linewidth=1, label="one_weight")
            bottom = min(axis.get_ylim()[0], level - 0.1 * (start - level))
            axis.set_ylim(bottom, start + 0.15 * (start - bottom))
            axis.grid(alpha=0.3)
            axis.xaxis.set_minor_formatter(NullFormatter())
    axes[1, 0].set_xlabel("seconds")
    axes[1, 1].set_xlabel("gradients and products")
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return True
