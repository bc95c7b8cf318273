"""The table and the picture of ``tune_l2.py``."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from examples.shared.record import Line
from examples.shared.table import markdown, spread


def table(results: dict[str, list[Line]], simple: list[Line]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    names = ["validation", "running", "test", "refit", "seconds"]
    header = ["method", *names, "seconds to target", "evaluations to target"]
    rows = {}
    for name in simple[0]:
        rows[name] = [_cell([row[name].get(n) for row in simple]) for n in names] + ["", ""]
    targets = [_target([runs[i] for runs in results.values()]) for i in range(len(simple))]
    for method, runs in results.items():
        rows[method] = [_cell([run.get(n) for run in runs]) for n in names]
        for axis in ("seconds", "evaluations"):
            pairs = zip(runs, targets, strict=True)
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
    return best["validation"] + 0.01 * (best["path"][0]["resolved"] - best["validation"])


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known if len(known) == len(values) else [], _number)


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
