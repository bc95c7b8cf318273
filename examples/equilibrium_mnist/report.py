"""The table and the picture of ``equilibrium_mnist.py``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from examples.equilibrium_mnist.rows import METHODS
from examples.shared.record import Line
from examples.shared.table import markdown, spread


def table(results: dict[str, list[Line]]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    names = ["test", "loss", "norm", "steps", "evaluations", "seconds"]

    def cell(runs: list[Line], name: str) -> str:
        return spread([run[name] for run in runs if name in run], "{:.4g}".format)

    rows = {row: [cell(runs, name) for name in names] for row, runs in results.items()}
    return markdown(["row", *names], rows)


def draw(results: dict[str, list[Line]], path: Path) -> None:
    """Training loss and test accuracy of the first seed, against seconds and evaluations."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    figure.suptitle("Equilibrium model of MNIST, at the solved equilibrium")
    flat = {"loss": "training loss", "test": "test accuracy"}
    for row, (kind, label) in zip(axes, flat.items(), strict=True):
        row[0].set_ylabel(label)
        for axis, name in zip(row, ("seconds", "evaluations"), strict=True):
            for method in (m for m in METHODS if m in results):
                path_of = results[method][0]["path"]
                xs, ys = ([point[key] for point in path_of] for key in (name, kind))
                axis.plot(xs, ys, ".-", linewidth=1.3, label=method)
            simple = results["network, W = 0"][0][kind]
            axis.axhline(simple, color="black", linestyle=":", label="network, W = 0")
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[1, 0].set_ylim(bottom=0.7)
    axes[1, 0].set_xlabel("CPU seconds")
    axes[1, 1].set_xlabel("gradients, maps and products")
    axes[1, 1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
