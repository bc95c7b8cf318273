"""The table and the picture of ``poison``."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor

from examples.results.published import POISON, sentences
from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread

WANTED = {
    "untargeted": "test error of the victim",
    "targeted": "share of the test file's eights that the victim calls 3",
    "perturbation": "test error of the victim",
    "clean_label": "share of targets that the victim takes for the other class",
}
COLUMNS = {
    "success": "success",
    "error": "test error",
    "increase": "increase, points",
    "defended_success": "success, defended",
    "defended_error": "test error, defended",
    "poison_weight": "weight of poisons",
    "clean_weight": "of the others",
    "seconds": "seconds",
}
Z = 1.959964  # the normal distribution's 97.5 %


def student_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by Student's t; needs two values."""
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return mean - half, mean + half


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate, by Wilson's score."""
    rate, scale = successes / count, 1 + Z**2 / count
    centre = (rate + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def section(content: Line) -> str:
    """The page of one results.json: what was run, and the table."""
    runs, run = content["runs"], content["runs"][0]["run"]
    results = with_increase(by_method(runs))
    seeds = len({entry["run"]["seed"] for entry in runs})
    size = f"{run['train']:,} training images" if "train" in run else run["dataset"]
    facts = (
        f"{run['attack']}: {WANTED[run['attack']]}. Poisons: {run['poisons']:,}; {size}; "
        f"seeds: {seeds}."
    )
    found = POISON.get(run["attack"])
    published = sentences([found]) if found else "No published number was found for this attack."
    return f"{facts}\n\n{table(run['attack'], results)}\n\n{published}"


def with_increase(results: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """Every run with how many points its error is above that of the clean victim."""
    clean = [run["error"] for run in results.get("clean", [])]
    found: dict[str, list[Line]] = {}
    for name, runs in results.items():
        found[name] = [dict(run) for run in runs]
        for run, below in zip(found[name], clean, strict=False):
            run["increase"] = 100 * (run["error"] - below)
    return found


def table(attack: str, results: dict[str, list[Line]]) -> str:
    """Medians (ranges) over the seeds; rates with their 95 % intervals."""
    columns = [c for c in COLUMNS if any(c in run for runs in results.values() for run in runs)]
    rows = {}
    for name, runs in results.items():
        rows[name] = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if "success" in column and values:
                rows[name].append(_rate(values, counted=attack == "clean_label"))
            else:
                rows[name].append(spread(values, _decimals(column).format))
    return markdown(["method", *(COLUMNS[column] for column in columns)], rows)


def _decimals(column: str) -> str:
    return "{:.1f}" if column in ("seconds", "increase") else "{:.3f}"


def _rate(values: list[float], counted: bool) -> str:
    mean = statistics.mean(values)
    if counted:
        low, high = wilson_interval(round(sum(values)), len(values))
        return f"{round(sum(values))} of {len(values)} [{low:.2f}, {high:.2f}]"
    if len(values) < 2:
        return f"{mean:.3f}"
    low, high = student_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(
    pairs: tuple[Tensor, Tensor],
    labels: list[str],
    results: dict[str, list[Line]],
    measure: str,
    title: str,
    path: Path,
) -> None:
    """Poisons under their originals, and what victims do along the runs of the first seed.

    Args:
        pairs: originals and poisons, (n, C, H, W) in [0, 1].
        labels: above each pair.
        results: of the first seed.
        measure: what the attack wants.
        title: of the picture.
        path: the file.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.2])
    top.suptitle(f"{title}\nbefore (above) and after: what it shows, what it is called")
    count = min(12, len(labels))
    axes = top.subplots(2, count, squeeze=False)
    for row, images in zip(axes, pairs, strict=True):
        for axis, image in zip(row, images[:count].cpu(), strict=True):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.axis("off")
    for axis, label in zip(axes[0], labels, strict=False):
        axis.set_title(label, fontsize=9)
    _draw_runs(bottom.subplots(), results, measure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_runs(axis: Axes, results: dict[str, list[Line]], measure: str) -> None:
    """A line of each method along its run, a level for each simple row."""
    styles = iter((":", "--", "-.", (0, (1, 4)), (0, (5, 5))))
    for name, runs in results.items():
        if "path" in runs[0]:
            points = runs[0]["path"]
            values = [point[measure] for point in points]
            width = 2.5 if name == "penalty" else 1.2
            axis.plot([p["evaluations"] for p in points], values, ".-", label=name, lw=width)
            if name == "penalty" and f"defended_{measure}" in runs[0]:
                axis.axhline(
                    runs[0][f"defended_{measure}"], color="tab:green", lw=1.5, label="defended"
                )
        else:
            axis.axhline(runs[0][measure], color="black", lw=1, ls=next(styles), label=name)
    axis.set(xlabel="gradients and products", ylabel=measure, title="Victims along the run")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
