"""The table and the picture of ``mix_sources``."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread

COLUMNS = {
    "test": "held-out loss, nats",
    "gain": "below uniform",
    "worst": "largest corrupted weight / mean weight",
    "wanted": "weight of the wanted",
    "other": "of the others",
    "corrupted": "of the corrupted",
    "seconds": "seconds",
    "times": "times plain training",
}
COLOURS = {"wanted": "tab:green", "other": "tab:blue", "corrupted": "tab:red"}


def against_uniform(results: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """Every run with how far its loss is below, and how long it took beside, "uniform" on its seed.

    Nothing where a seed lacks that row.
    """
    plain = results.get("uniform", [])
    found: dict[str, list[Line]] = {}
    for name, runs in results.items():
        found[name] = [dict(run) for run in runs]
        for run, beside in zip(found[name], plain, strict=False):
            run["gain"] = beside["test"] - run["test"]
            run["times"] = run["seconds"] / beside["seconds"]
    return found


def section(content: Line) -> str:
    """The page of one results.json: what was run, the table, and what was to be shown."""
    runs, run = content["runs"], content["runs"][0]["run"]
    results = against_uniform(by_method(runs))
    kinds = runs[0]["result"]["kinds"]
    counts = {kind: kinds.count(kind) for kind in COLOURS}
    facts = (
        f"{len(kinds)} sources of 20 Newsgroups: {counts['wanted']} of the wanted subject, "
        f"{counts['other']} others, {counts['corrupted']} corrupted. Transformer of width "
        f"{run['width']}, {run['layers']} layers, context {run['context']}; {run['budget']:,} "
        f"steps of {run['windows']} windows; u moves every {run['every']} steps."
    )
    parts = [facts, table(results), *shown(results)]
    return "\n\n".join(parts)


def table(results: dict[str, list[Line]]) -> str:
    """Medians (ranges) over the seeds in Markdown."""
    rows = {
        name: [spread([r[key] for r in runs if key in r], _decimals(key).format) for key in COLUMNS]
        for name, runs in results.items()
    }
    return markdown(["method", *COLUMNS.values()], rows)


def shown(results: dict[str, list[Line]]) -> list[str]:
    """One sentence: is the penalty's lead over equal weights more than the spread?"""
    gains = [run["gain"] for run in results.get("penalty", []) if "gain" in run]
    if len(gains) < 2:
        return []
    rejected = sum(run["worst"] < 0.1 for run in results["penalty"])
    return [
        f"penalty: every corrupted source below a tenth of the mean weight in {rejected} of "
        f"{len(gains)} seeds; held-out loss below that of equal weights by "
        f"{statistics.mean(gains):.3f} ± {statistics.stdev(gains):.3f} nats (mean and standard "
        "deviation over the seeds, paired)."
    ]


def _decimals(key: str) -> str:
    return {"seconds": "{:.0f}", "times": "{:.2f}"}.get(key, "{:.3f}")


def draw(results: dict[str, list[Line]], path: Path) -> None:
    """Weights along the run of the methods that learn them, and losses against seconds.

    Args:
        results: of the first seed.
        path: the file.
    """
    learning = [name for name in ("penalty", "t1_t2", "doremi") if name in results]
    figure = Figure(figsize=(5 * (len(learning) + 1), 4.5), layout="constrained")
    axes = figure.subplots(1, len(learning) + 1, squeeze=False)[0]
    for name, axis in zip(learning, axes, strict=False):
        _draw_weights(axis, name, results[name][0])
    _draw_losses(axes[-1], results)
    if learning:  # one legend for all of them: the sources are the same
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_weights(axis: Axes, name: str, run: Line) -> None:
    steps = [0, *(point["step"] for point in run["path"])]
    for k, (source, kind) in enumerate(zip(run["names"], run["kinds"], strict=True)):
        mean = 1 / len(run["names"])
        values = [1.0, *(point["weights"][k] / mean for point in run["path"])]
        axis.plot(steps, values, color=COLOURS[kind], label=source, lw=1.5, ls=_styles(run, k))
    axis.axhline(0.1, color="black", lw=0.8, ls=":")
    axis.set(yscale="log", xlabel="step", ylabel="weight / mean weight", title=name)
    axis.grid(alpha=0.3)


def _styles(run: Line, k: int) -> str:
    """Sources of one kind differ in their dashes."""
    before = run["kinds"][:k].count(run["kinds"][k])
    return ("-", "--", "-.", ":")[before % 4]


def _draw_losses(axis: Axes, results: dict[str, list[Line]]) -> None:
    for name, runs in results.items():
        points = [point for point in runs[0]["path"] if "test" in point]
        axis.plot(
            [point["seconds"] for point in points],
            [point["test"] for point in points],
            label=name,
            linewidth=2.5 if name == "penalty" else 1.2,
        )
    axis.set(xlabel="seconds", ylabel="held-out loss, nats per letter", title="Along the run")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
