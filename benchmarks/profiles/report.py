"""Tables and picture of the profiles."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.profiles.arithmetic import Costs, ratios, shares
from benchmarks.profiles.solvers import Rates
from examples.shared.record import Line
from examples.shared.table import markdown

LOOKS = (100, 300, 1000)
SHOWN = {  # the others are grey
    "minimize": "black",
    "default": "C3",
    "waiting": "C1",
    "value": "C4",
    "paper": "C5",
    "cg": "C0",
    "neumann": "C9",
    "reverse": "C2",
}


class Found(NamedTuple):
    """Everything that was measured; rows are in the order of ``places``."""

    places: list[tuple[str, int]]
    """(problem, seed)."""
    results: dict[str, list[Line]]
    """By solver."""
    costs: dict[float, Costs]
    """By accuracy."""
    best: list[float]
    """F*."""
    rates: dict[str, Rates]
    budget: int


def reason(result: Line) -> str:
    """Why a run did not solve its problem, in a word or two."""
    if result["ended"].startswith("raised"):
        return result["ended"].partition(":")[0]
    if result["ended"] == "ran off":
        return "ran off"
    if result["warned"]:
        return "warned"
    return "budget" if result["ended"] == "over" else result["ended"]


def print_tables(found: Found) -> None:
    """Shares solved, why not, and who solves what."""
    finest = min(found.costs)
    looks = [*(x for x in LOOKS if x < found.budget), found.budget]
    header = ["solver", "rates"]
    header += [f"{accuracy:g} by {x}" for accuracy in found.costs for x in looks]
    rows = {}
    for name, results in found.results.items():
        cells = [", ".join(f"{rate:g}" for rate in found.rates[name]) if any(found.rates[name])
                 else ""]  # fmt: skip
        for costs in found.costs.values():
            cells += [f"{share:.0%}" for share in shares(costs[name], looks)]
        missed = [
            reason(r)
            for r, c in zip(results, found.costs[finest][name], strict=True)
            if c == math.inf
        ]
        counted = collections.Counter(missed).most_common()
        rows[name] = [*cells, ", ".join(f"{why} {n}" for why, n in counted)]
    print("\n" + markdown([*header, f"not solved to {finest:g}"], rows))
    print("\n" + by_problem(found, found.costs[finest]))
    if left := on_data(found):
        print("\n" + left)
    print("\n" + said(found))


def by_problem(found: Found, costs: Costs) -> str:
    """Seeds solved and their median evaluations, per problem."""
    names = list(dict.fromkeys(problem for problem, _ in found.places))
    rows = {}
    for problem in names:
        at = [i for i, place in enumerate(found.places) if place[0] == problem]
        mine = {name: [row[i] for i in at] for name, row in costs.items()}
        solved = sum(min(row) < math.inf for row in mine.values())
        rest = {name: row for name, row in mine.items() if name not in ("default", "minimize")}
        cells = [cell(mine[name]) if name in mine else "" for name in ("default", "minimize")]
        if rest:
            best = min(rest, key=lambda name: (statistics.median_high(rest[name]), sum(rest[name])))
            cells.append(f"{best}: {cell(rest[best])}" if min(rest[best]) < math.inf else "none")
        else:
            cells.append("")
        rows[problem] = [*cells, f"{solved} of {len(mine)}"]
    header = ["problem", "default", "minimize", "best of the others", "solvers with a solution"]
    return markdown(header, rows)


def on_data(found: Found) -> str:
    """F - F* over the start's at the last look, where F* is only the best that was seen."""
    first = next(iter(found.results.values()))
    names = [p for (p, _), r in zip(found.places, first, strict=True) if r["best"] is None]
    names = list(dict.fromkeys(names))
    rows = {}
    for solver, results in found.results.items():
        left = collections.defaultdict[str, list[float]](list)
        for (problem, _), best, result in zip(found.places, found.best, results, strict=True):
            if problem in names and result["path"]:
                end = result["path"][-1][1]
                left[problem].append((end - best) / (result["first"] - best))
        rows[solver] = [
            f"{statistics.median_high(left[name]):.3f}" if left[name] else "" for name in names
        ]
    return markdown(["left of F - F*, median", *names], rows) if names else ""


def cell(costs: Sequence[float]) -> str:
    """How many are solved, and the median evaluations of those."""
    ended = [c for c in costs if c < math.inf]
    text = f"{len(ended)}/{len(costs)}"
    return f"{text}, {statistics.median(ended):.0f}" if ended else text


def said(found: Found) -> str:
    """What was raised or warned of: by whom, how often, where, and the first time in words."""
    places = collections.defaultdict[tuple[str, str], list[str]](list)
    words = dict[tuple[str, str], str]()
    for name, results in found.results.items():
        for (problem, _), result in zip(found.places, results, strict=True):
            for text in (result["ended"], result["warned"] and f"warned: {result['warned']}"):
                if text.startswith(("raised", "warned")):
                    key = name, text.partition(":")[0]
                    places[key].append(problem)
                    words.setdefault(key, " ".join(text.split())[:160])
    return "\n".join(
        f"- {key[0]}, {len(where)} x ({', '.join(dict.fromkeys(where))}): {words[key]}"
        for key, where in places.items()
    )


def draw(found: Found, path: Path) -> None:
    """Above the data profiles, below the performance profiles; a column per accuracy."""
    figure = Figure(figsize=(11.0, 8.4), layout="constrained")
    panels = figure.subplots(2, len(found.costs), squeeze=False)
    for column, (accuracy, costs) in enumerate(found.costs.items()):
        left = f"solved: F - F* at most {accuracy:g} of the start's"
        top, bottom = panels[0][column], panels[1][column]
        steps(top, costs, 10.0, float(found.budget))
        top.set(title=left, xlabel="evaluations")
        steps(bottom, ratios(costs), 1.0, 100.0)
        bottom.set(xlabel="evaluations over those of the best solver of the problem")
        for panel in (top, bottom):
            panel.set_ylim(0, 1.02)
            panel.set_ylabel("share of problems solved")
            panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def steps(axes: Axes, costs: Costs, low: float, high: float) -> None:
    """A staircase per solver, its name at its end."""
    ends = {}
    for name in sorted(costs, key=lambda name: name in SHOWN):
        at = sorted({low, high, *(c for c in costs[name] if low < c < high)})
        heights = shares(costs[name], at)
        color, width = SHOWN.get(name, "0.8"), 2.0 if name in SHOWN else 1.0
        axes.step(at, heights, where="post", color=color, linewidth=width)
        if name in SHOWN:
            ends[name] = heights[-1]
    for name, height in apart(ends, 0.045).items():
        axes.annotate(
            name, (1.01, height), xycoords=("axes fraction", "data"), color=SHOWN[name],
            va="center", fontsize=9, annotation_clip=False,
            weight="bold" if name == "default" else "normal",
        )  # fmt: skip
    axes.set(xscale="log", xlim=(low, high))
    ticks = [x for x in (1, 3, 10, 30, 100, 300, 1000, 3000) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.set_xticks([], minor=True)


def apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights, in their order, ``gap`` apart: those that are too close around their mean."""
    groups = [[name] for name in sorted(heights, key=lambda name: heights[name])]

    def low(group: list[str]) -> float:
        return statistics.mean(heights[name] for name in group) - gap * (len(group) - 1) / 2

    at = 1
    while at < len(groups):
        below, group = groups[at - 1], groups[at]
        if low(below) + gap * len(below) > low(group) + 1e-12:
            groups[at - 1 : at + 1] = [below + group]
            at = max(at - 1, 1)
        else:
            at += 1
    return {name: low(group) + gap * i for group in groups for i, name in enumerate(group)}
