"""Tables, verdict and figure of ``race.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _record import Line
from matplotlib.figure import Figure

TARGETS = (("accuracy", 0.95), ("accuracy", 0.995), ("told_right", 0.95), ("told_right", 0.995))
BAR = 0.25
SCORES = {"accuracy": "accuracy", "told_right": "told right", "auc": "AUC"}
Races = Mapping[float, tuple[dict[str, list[Line]], list[Line]]]
"""By noise level: the runs of each method and the baselines, both one per seed."""


def best_of(runs: dict[str, list[Line]], simple: list[Line], score: str) -> list[float]:
    """Per seed the best score of any row but the oracle, at any time."""
    best = []
    for seed, rows in enumerate(simple):
        seen = [s[score] for results in runs.values() for s in results[seed]["path"]]
        best.append(max(seen + [rows[name][_ended(score)] for name in rows if name != "oracle"]))
    return best


def _ended(score: str) -> str:
    """What the baselines call it."""
    return "retrained" if score == "accuracy" else score


def time_to(run: Line, score: str, target: float) -> float:
    """CPU seconds until the score was first seen at ``target``; inf if it never was."""
    return next((s["cpu"] for s in run["path"] if s[score] >= target), math.inf)


def value_at(run: Line, seconds: float, name: str) -> float:
    """The last value seen by then, at least the first; -inf after a failure."""
    seen = [s[name] for s in run["path"] if s["cpu"] <= seconds or s is run["path"][0]]
    ended = run["path"][-1]["cpu"] if run["path"] else 0.0
    return -math.inf if not seen or ("failed" in run and seconds > ended) else seen[-1]


def cell(values: list[float], digits: int = 3, never: str = "never") -> str:
    """Median (range); ``never`` stands for inf, "failed" for -inf."""

    def text(value: float) -> str:
        if value == -math.inf:
            return "failed"
        return f"{value:.{digits}f}" if value < math.inf else never

    if not values:
        return ""
    ordered = sorted(values)
    # With an even number of seeds the lower median would flatter, so the upper one.
    middle = ordered[len(ordered) // 2] if math.inf in ordered else statistics.median(ordered)
    if text(ordered[0]) == text(ordered[-1]):
        return text(middle)
    return f"{text(middle)} ({text(ordered[0])} to {text(ordered[-1])})"


def print_tables(
    races: Races,
    rates: Mapping[str, Any],
    groups: Mapping[str, str],
    early: float,
    seconds: float,
) -> None:
    """The tuned rates, per noise level the rows, and what the target of a quarter says."""
    print("\n| method | lower rate | upper rate | v-steps per u-step |\n|---|---|---|---|")
    for method, chosen in rates.items():
        print(f"| {method} | {chosen.lower:g} | {chosen.upper:g} | {chosen.lower_steps} |")
    for noise, (runs, simple) in races.items():
        best = {name: best_of(runs, simple, name) for name in SCORES}
        reached = ", ".join(
            f"{SCORES[name]} {cell(best[name])}" for name in ("accuracy", "told_right")
        )
        print(f"\n### noise {noise:g}\n\nBest without the oracle: {reached}.\n")
        header = ["row", "ms per u-step", *(f"s to {_said(*target)}" for target in TARGETS)]
        header += [f"accuracy at {early:g} s", f"at {seconds:g} s", "told right", "AUC"]
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
        for method, results in runs.items():
            print(_row(method, results, best, early, seconds))
        for name in simple[0]:
            print(_simple_row(name, [rows[name] for rows in simple], best))
    print_verdicts(races, groups, seconds)


def print_verdicts(races: Races, groups: Mapping[str, str], seconds: float) -> None:
    """Our times over the best peer's of the same seed, and our last scores minus their best."""
    header = ["noise, row", *(_said(*target) for target in TARGETS)]
    header += [f"{_said(name, share)} of the peers" for name, share in TARGETS if share > 0.99]
    header += [f"{name}, last" for name in SCORES.values()]
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for noise, (runs, simple) in races.items():
        peers = {name: runs[name] for name, group in groups.items() if group == "peer"}
        for method in (name for name, group in groups.items() if group == "ours" and peers):
            columns = [f"{noise:g}, {method}"]
            for score, share in TARGETS:
                goals = [share * reached for reached in best_of(runs, simple, score)]
                columns.append(_ratio(runs[method], peers, score, goals, seconds))
            for score, share in (target for target in TARGETS if target[1] > 0.99):
                goals = [share * reached for reached in best_of(peers, [{}] * len(simple), score)]
                columns.append(_ratio(runs[method], peers, score, goals, seconds))
            columns += [_gap(runs[method], peers, score) for score in SCORES]
            print("| " + " | ".join(columns) + " |")


def _said(score: str, share: float) -> str:
    return f"{share:.1%} of {SCORES[score]}"


def _row(method: str, results: list[Line], best: Line, early: float, end: float) -> str:
    ends = [run["path"][-1] for run in results if run["path"]]
    columns = [method, cell([1e3 * seen["cpu"] / seen["step"] for seen in ends], 1)]
    for name, share in TARGETS:
        times = [time_to(r, name, share * b) for r, b in zip(results, best[name], strict=True)]
        columns.append(cell(times, 2, f"> {end:g}"))
    columns.append(cell([value_at(run, early, "accuracy") for run in results]))
    columns += [cell([value_at(run, math.inf, name) for run in results]) for name in SCORES]
    failed = [run["failed"] for run in results if "failed" in run]
    if failed:
        columns[0] += f" (failed in {len(failed)} of {len(results)}: {failed[0][:60]})"
    return "| " + " | ".join(columns) + " |"


def _simple_row(name: str, results: list[Line], best: Line) -> str:
    """A baseline is ready when its training has ended; its time is that, or never."""
    columns = [f"{name}, after {cell([r['seconds'] for r in results], 1)} s", ""]
    for target, share in TARGETS:
        pairs = zip(results, best[target], strict=True)
        reached = sum(r[_ended(target)] >= share * b for r, b in pairs)
        columns.append(f"reached {reached}/{len(results)}")
    columns += ["", cell([r["retrained"] for r in results])]
    columns += [cell([r[score] for r in results]) for score in ("told_right", "auc")]
    return "| " + " | ".join(columns) + " |"


def _ratio(
    mine: list[Line], peers: dict[str, list[Line]], score: str, goals: list[float], seconds: float
) -> str:
    """Time to a goal per seed, over the best peer's; with "<" where no peer arrived at all."""
    times = [time_to(run, score, goal) for run, goal in zip(mine, goals, strict=True)]
    theirs = [
        min(time_to(results[seed], score, goal) for results in peers.values())
        for seed, goal in enumerate(goals)
    ]
    ratios = [own / min(other, seconds) for own, other in zip(times, theirs, strict=True)]
    absent, middle = theirs.count(math.inf), statistics.median(ratios)
    bounds_only = absent == len(theirs) and math.inf not in ratios
    missed = "undecided" if bounds_only else "MISSED"
    bound = f", no peer arrived in {absent} of {len(theirs)} seeds" if absent else ""
    below = "< " if bounds_only else ""
    return f"{below}{cell(ratios, 2)} {'met' if middle <= BAR else missed}{bound}"


def _gap(mine: list[Line], peers: dict[str, list[Line]], score: str) -> str:
    gaps = [
        value_at(run, math.inf, score)
        - max(value_at(results[seed], math.inf, score) for results in peers.values())
        for seed, run in enumerate(mine)
    ]
    spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
    return f"{statistics.median(gaps):+.3f}{spread}"


def draw(races: Races, groups: Mapping[str, str], path: Path) -> None:
    """Median test accuracy against CPU seconds, one line per method, one panel per noise level."""
    figure = Figure(figsize=(4.4 * len(races), 4.6), layout="constrained")
    panels = figure.subplots(1, len(races), squeeze=False)[0]
    styles = {"ours": "-", "ours (reference)": ":", "peer": "--"}
    for axes, (noise, (runs, simple)) in zip(panels, races.items(), strict=True):
        for index, (method, results) in enumerate(runs.items()):
            group = groups[method]
            times = [seen["cpu"] for seen in results[0]["path"]]
            columns = [[value_at(run, t, "accuracy") for run in results] for t in times]
            width = 2.2 if group == "ours" else 1.2
            axes.plot(times, [statistics.median(c) for c in columns], styles[group],
                      color=f"C{index}", linewidth=width, label=method)  # fmt: skip
        for name, marker in (("agreement filter", "s"), ("validation only", "o")):
            spent = statistics.median(rows[name]["seconds"] for rows in simple)
            reached = statistics.median(rows[name]["retrained"] for rows in simple)
            axes.plot(spent, reached, marker, color="black", markersize=5, label=name)
        axes.set(xscale="log", xlabel="CPU seconds of training", title=f"noise {noise:g}")
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.2, max(seen["cpu"] for seen in next(iter(runs.values()))[0]["path"]))
        axes.set_ylim(bottom=0.6)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy of the running model")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(2 * len(races), 4), fontsize=8
    )
    figure.savefig(path, dpi=72)
