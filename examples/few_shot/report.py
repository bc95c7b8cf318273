"""The table and the picture of ``few_shot``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from examples.few_shot.problem import Size
from examples.results.published import FEW_SHOT, OMNIGLOT, sentences
from examples.shared.experiment import by_method
from examples.shared.record import Line
from examples.shared.table import markdown, spread

SHOWN = 4  # query images of each class in the picture


def section(content: Line) -> str:
    """The page of one results.json: what was run, and the table."""
    run = content["runs"][0]["run"]
    encoder = f"conv4 of {run['width']} channels" if run["encoder"] == "conv4" else "the ResNet"
    return (
        f"{run['dataset']}, {run['ways']}-way {run['shots']}-shot, {run['queries']} query images "
        f"per class ({run['train_queries']} in training), {encoder}, {run['head']} heads; "
        f"{run['meta_batch']} tasks per meta-iteration, "
        f"{run['budget']} s per method; {run['test_tasks']} test tasks"
        f"{' of the classes for choosing knobs' if run['validation'] else ''}.\n\n"
        f"{table(by_method(content['runs']))}\n\n"
        f"{published(run)}"
    )


def published(run: Line) -> str:
    """Others' results on this kind of task, full size."""
    found = FEW_SHOT.get((run["dataset"], run["ways"], run["shots"]), [])
    return sentences([*found, OMNIGLOT] if run["dataset"] == "omniglot" else found)


def table(results: dict[str, list[Line]]) -> str:
    """Medians (ranges) over the seeds in Markdown; intervals are those over tasks."""
    header = ["method", "accuracy alone", "±", "transductive", "±"]
    header += ["meta-iterations", "lower steps of each", "seconds", "MB of one"]
    formats = {
        **{"alone": "{:.2%}", "alone_interval": "{:.2%}"},
        **{"transductive": "{:.2%}", "transductive_interval": "{:.2%}"},
        **{"steps": "{:.0f}", "lower_steps": "{:.1f}", "seconds": "{:.0f}", "megabytes": "{:.0f}"},
    }
    for run in (run for runs in results.values() for run in runs):
        run["megabytes"] = run["peak_bytes"] / 1e6
    rows = {
        name: [spread([run[key] for run in runs], of.format) for key, of in formats.items()]
        for name, runs in results.items()
    }
    return markdown(header, rows)


def draw(done: list[tuple[Line, Line]], task: Tensor, size: Size, path: Path) -> None:
    """All runs against time, and a test task with what the first of them tells.

    Args:
        done: what defines each run, and its result.
        task: images of the first test task, (ways, shots + queries, channels, height, width).
        size: of it.
        path: where to.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1])[0]
    line, result = done[0]
    _draw_paths(left.subplots(), done)
    left.suptitle(f"{line['dataset']}, {size.ways}-way {size.shots}-shot, classes never seen")
    right.suptitle(f"a test task, as {line['method']} tells it")
    columns = min(SHOWN, size.queries)
    axes = right.subplots(size.ways, 1 + columns, squeeze=False)
    for way in range(size.ways):
        _show(axes[way, 0], task[way, 0], f"class {way}", "black")
        for column in range(columns):
            told = result["told"][way * size.queries + column]
            colour = "tab:green" if told == way else "tab:red"
            _show(axes[way, 1 + column], task[way, size.shots + column], f"told {told}", colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _show(axis: Axes, image: Tensor, title: str, colour: str) -> None:
    pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
    axis.imshow(pixels, cmap="gray_r" if pixels.ndim == 2 else None)
    axis.set_title(title, color=colour, fontsize=8)
    axis.axis("off")


def _draw_paths(axis: Axes, done: list[tuple[Line, Line]]) -> None:
    """Accuracy without query statistics; bands are intervals over the tasks looked at."""
    colours: dict[str, str] = {}
    for line, result in done:
        name, path = line["method"], result["path"]
        seconds = [point["seconds"] for point in path]
        colour = colours.setdefault(name, f"C{len(colours)}")
        label = name if line["seed"] == done[0][0]["seed"] else None
        middle = [point["accuracy"] for point in path]
        axis.plot(seconds, middle, ".-", color=colour, label=label)
        low = [point["accuracy"] - point["interval"] for point in path]
        high = [point["accuracy"] + point["interval"] for point in path]
        axis.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="seconds of training", ylabel="accuracy, no statistics of query images")
    axis.legend()
    axis.grid(alpha=0.3)
