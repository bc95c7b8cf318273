"""The table and the picture of ``denoise``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from examples.denoise.problem import Problem
from examples.results.published import DENOISE, sentences
from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread

COLUMNS = {
    "running": "running model",
    "retrained": "retrained",
    "closed": "gap closed",
    "told_right": "labels told right",
    "auc": "AUC",
    "seconds": "seconds",
}


def with_gap(results: dict[str, list[Line]]) -> dict[str, list[Line]]:
    """Every run with the share that it closed of the gap between validation only and oracle.

    By the better of its two models; nothing where a seed lacks one of these rows.
    """
    ends = zip(results.get("validation", []), results.get("oracle", []), strict=False)
    gaps = [(low["retrained"], high["retrained"]) for low, high in ends]
    found: dict[str, list[Line]] = {}
    for name, runs in results.items():
        found[name] = [dict(run) for run in runs]
        for run, (low, high) in zip(found[name], gaps, strict=False):
            best = max(run.get("running", 0.0), run["retrained"])
            run["closed"] = (best - low) / (high - low)
    return found


def section(content: Line) -> str:
    """The page of one results.json: what was run, and the table."""
    run = content["runs"][0]["run"]
    wrong = {"uniform": "any other class", "pair": "the next class"}[run["flip"]]
    return (
        f"{run['dataset']}, {run['model']}: {run['train']:,} images, {run['noise']:.0%} of them "
        f"with a wrong label ({wrong}), {run['clean']:,} clean ones.{_epochs(run)}\n\n"
        f"{table(by_method(content['runs']))}\n\n"
        f"{published(run)}"
    )


def _epochs(run: Line) -> str:
    share = run.get("epochs_share", 1)
    return "" if share == 1 else f" Plain trainings took {share:g} of their usual epochs."


def published(run: Line) -> str:
    """What is known of others' results on this data set at this noise."""
    found = DENOISE.get((run["dataset"], run["noise"])) if run["flip"] == "uniform" else None
    return sentences([found]) if found else "No published number was found for this setting."


def table(results: dict[str, list[Line]]) -> str:
    """Medians (ranges) over the seeds in Markdown."""
    rows = {}
    for name, runs in with_gap(results).items():
        rows[name] = [
            spread([run[key] for run in runs if key in run], _decimals(key).format)
            for key in COLUMNS
        ]
    return markdown(["method", *COLUMNS.values()], rows)


def _decimals(key: str) -> str:
    return "{:.1f}" if key == "seconds" else "{:.3f}"


def draw(
    problem: Problem, weights: Tensor, results: dict[str, list[Line]], title: str, path: Path
) -> None:
    """The most suspicious images, the runs of the first seed, and the learned weights."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    top.suptitle(f"{title}\nlowest learned weights: given label (true label)")
    suspects = weights.argsort()[:24].tolist()
    for axis, index in zip(top.subplots(3, 8).flat, suspects, strict=False):
        image = problem.images[index].cpu().permute(1, 2, 0).squeeze(-1)
        given, true = int(problem.labels[index]), int(problem.truth[index])
        axis.imshow(image, cmap="gray_r" if image.dim() == 2 else None)
        axis.set_title(f"{given} ({true})", color="tab:red" if given != true else "tab:green")
        axis.axis("off")
    curves, histogram = bottom.subplots(1, 2, width_ratios=[1.6, 1])
    _draw_runs(curves, results)
    weights, is_right = weights.cpu(), problem.is_right.cpu()
    for name, chosen in (("label right", is_right), ("label wrong", ~is_right)):
        histogram.hist(weights[chosen], bins=np.linspace(0, 1, 31), alpha=0.6, label=name)
    histogram.set(xlabel="learned weight", ylabel="images", title="Learned weights")
    histogram.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw_runs(axis: Axes, results: dict[str, list[Line]]) -> None:
    """Test accuracy of the first seed's running models; a line for each row without one."""
    styles = iter((":", "--", "-.", (0, (1, 4)), (0, (5, 5))))
    for name, runs in results.items():
        if "path" in runs[0]:
            points = runs[0]["path"]
            axis.plot(
                [point["seconds"] for point in points],
                [point["accuracy"] for point in points],
                ".-",
                label=name,
                linewidth=2.5 if name == "penalty" else 1.2,
            )
        else:
            axis.axhline(
                runs[0]["retrained"], color="black", linewidth=1, linestyle=next(styles), label=name
            )
    axis.set(xlabel="seconds", ylabel="test accuracy", title="Along the run")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
