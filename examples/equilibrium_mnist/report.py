"""The table and the picture of ``equilibrium_mnist``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread


def section(content: Line) -> str:
    """The page of one results.json: what was run, the agreement, and the table."""
    results = by_method(content["runs"])
    run = next(entry["run"] for entry in content["runs"] if "budget" in entry["run"])
    return (
        f"{run['train']:,} images, {run['test']:,} to test, z of {run['width']} numbers, "
        f"{run['budget']:,} gradients, maps and products.\n\n"
        f"{agreement_table(results['agreement'][0])}\n\n{table(results)}"
    )


def agreement_table(found: Line) -> str:
    """How far the hypergradients are from the exact one."""
    columns = ("1 - cosine", "relative error")
    rows = {method: [f"{errors[c]:.1e}" for c in columns] for method, errors in found.items()}
    return markdown(["hypergradient", *columns], rows)


def table(results: dict[str, list[Line]]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    results = {name: runs for name, runs in results.items() if name != "agreement"}
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
            for method, runs in results.items():
                if "path" in runs[0]:
                    xs, ys = ([point[key] for point in runs[0]["path"]] for key in (name, kind))
                    axis.plot(xs, ys, ".-", linewidth=1.3, label=method)
            level = results["network"][0][kind]
            axis.axhline(level, color="black", linestyle=":", label="network, W = 0")
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[1, 0].set_xlabel("seconds")
    axes[1, 1].set_xlabel("gradients, maps and products")
    axes[1, 1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
