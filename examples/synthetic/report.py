"""The tables and the picture of ``synthetic``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.shared.record import Line
from examples.shared.table import markdown, spread
from examples.synthetic.formulation import FORMULAS
from examples.synthetic.methods import METHODS

# A numpy re-run of the published code with its settings, once: Adam 1e-3 for u and 1e-4 for v, ten
# lower steps, 40,001 upper ones. The paper shows curves, whose numbers were not found.
RERUN = {"smd20": 3.1e-3, "smd21": 1.4e-2, "smd22": 1.8e-3, "smd23": 8.3e-2, "smd24": 3.6e-2}
AGAIN = "published code, 40,001 x 10 steps, re-run once"
Results = dict[tuple[str, str], list[Line]]


def by_problem(runs: list[Line]) -> Results:
    """The results of ``runs`` (as in results.json), seed by seed, of each (method, problem)."""
    found: Results = {}
    for run in runs:
        key = run["run"]["method"], run["run"]["problem"]
        found.setdefault(key, []).append(run["result"])
    return found


def problems_of(results: Results) -> list[str]:
    """Those that were run."""
    return [name for name in FORMULAS if any(problem == name for _, problem in results)]


def section(content: Line) -> str:
    """The page of one results.json: what was run, the formulas, the errors."""
    run = content["runs"][0]["run"]
    seeds = len({entry["run"]["seed"] for entry in content["runs"]})
    return (
        f"{run['budget']:,} gradients and products per run; medians (ranges) over {seeds} "
        f"start{'s' * (seeds > 1)}.\n\n{table(by_problem(content['runs']))}\n\n{formulas()}"
    )


def table(results: Results) -> str:
    """Error at the end of each method, problem by problem, and the mean seconds of a run."""
    problems = problems_of(results)
    rows = {}
    for method in METHODS:
        mine = {problem: runs for (name, problem), runs in results.items() if name == method}
        if mine:
            errors = [
                spread([r["error"] for r in mine[name]], "{:.1e}".format) for name in problems
            ]
            seconds = np.mean([run["seconds"] for runs in mine.values() for run in runs])
            rows[method] = [*errors, f"{seconds:.1f}"]
    again = [f"{RERUN[name]:.1e}" if name in RERUN else "" for name in problems]
    rows[AGAIN] = [*again, ""]
    return markdown(["method", *problems, "seconds"], rows)


def formulas() -> str:
    """What the problems are; a list, for a Markdown table does not bear "|"."""
    return "\n".join(
        f"- {name}: `f = {formula.f}`, `g = {formula.g}`; error `{formula.error}`"
        for name, formula in FORMULAS.items()
    )


def draw(results: Results, budget: int, path: Path) -> None:
    """A panel per problem: error against evaluations, the median and the band of the seeds."""
    names = problems_of(results)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 3.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axis, name in zip(panels.flat, names, strict=False):
        for index, method in enumerate(METHODS):
            if (method, name) in results:
                paths = np.array([run["path"] for run in results[method, name]])
                xs = np.linspace(0, budget, paths.shape[1])
                finite = np.where(np.isfinite(paths), np.maximum(paths, 1e-17), np.nan)
                low, middle, high = _over_seeds(finite)
                width = 2.5 if method == "penalty" else 1.3
                axis.plot(xs, middle, color=f"C{index}", linewidth=width, label=method)
                axis.fill_between(xs, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(f"{name}: f = {FORMULAS[name].f}\ng = {FORMULAS[name].g}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in panels.flat[len(names) :]:
        axis.axis("off")
    figure.supxlabel("gradients and products", fontsize=10)
    figure.supylabel("distance to the solutions: median and range of the starts", fontsize=10)
    panels[0, 0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _over_seeds(values: np.ndarray) -> list[np.ndarray]:
    """Least, median and largest at every look; NaN where a run has ended in an error."""
    kinds: tuple[Callable[..., np.ndarray], ...] = (np.min, np.median, np.max)
    return [kind(values, axis=0) for kind in kinds]
