"""Tables, verdict and figure of ``race.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.race.problem import Problem
from examples.shared.record import Line

BAR = 0.25
Runs = Mapping[str, list[Line]]
Races = Mapping[str, tuple[Runs, list[Line]]]
"""By the title: the runs of each method and the baselines, both one per seed."""


def best_of(runs: Runs, simple: list[Line], score: str, ended: str) -> list[float]:
    """Per seed the best score of any row but the oracle, at any time."""
    best = []
    for seed, rows in enumerate(simple):
        seen = [s[score] for results in runs.values() for s in results[seed]["path"]]
        best.append(max(seen + [rows[name][ended] for name in rows if name != "oracle"]))
    return best


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
    races: Races, rates: Mapping[str, Any], problem: Problem, early: float, seconds: float
) -> None:
    """The tuned rates, per table the rows, and what the target of a quarter says."""
    print("\n| method | lower rate | upper rate | v-steps per u-step |\n|---|---|---|---|")
    for method, chosen in rates.items():
        print(f"| {method} | {chosen.lower:g} | {chosen.upper:g} | {chosen.lower_steps} |")
    for title, (runs, simple) in races.items():
        best = {name: best_of(runs, simple, name, _ended(problem, name)) for name in problem.scores}
        targets = dict.fromkeys(name for name, _ in problem.targets)
        reached = ", ".join(f"{problem.scores[name]} {cell(best[name])}" for name in targets)
        without = " without the oracle" if "oracle" in simple[0] else ""
        print(f"\n### {title}\n\nBest{without}: {reached}.\n")
        main, *others = problem.scores.values()
        header = ["row", "ms per u-step", *(f"s to {said(problem, *t)}" for t in problem.targets)]
        header += [f"{main} at {early:g} s", f"at {seconds:g} s", *others]
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
        for method, results in runs.items():
            print(_row(method, results, best, problem, early, seconds))
        for name in simple[0]:
            print(_simple_row(name, [rows[name] for rows in simple], best, problem))
    print_verdicts(races, problem, seconds)


def print_verdicts(races: Races, problem: Problem, seconds: float) -> None:
    """Our times over the best peer's of the same seed, and our last scores minus their best."""
    high = [(name, share) for name, share in problem.targets if share > 0.99]
    header = ["row", *(said(problem, *target) for target in problem.targets)]
    header += [f"{said(problem, *target)} of the peers" for target in high]
    header += [f"{name}, last" for name in problem.scores.values()]
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for title, (runs, simple) in races.items():
        groups = {method: problem.methods[method].group for method in runs}
        peers = {name: runs[name] for name, group in groups.items() if group == "peer"}
        for method in (name for name, group in groups.items() if group == "ours" and peers):
            columns = [f"{title}, {method}"]
            for (score, share), among in [(t, runs) for t in problem.targets] + [
                (t, peers) for t in high
            ]:
                rows = simple if among is runs else [{}] * len(simple)
                best = best_of(among, rows, score, _ended(problem, score))
                goals = [share * reached for reached in best]
                columns.append(_ratio(runs[method], peers, score, goals, seconds))
            columns += [_gap(runs[method], peers, score) for score in problem.scores]
            print("| " + " | ".join(columns) + " |")


def said(problem: Problem, score: str, share: float) -> str:
    return f"{share:.1%} of {problem.scores[score]}"


def _ended(problem: Problem, score: str) -> str:
    """What the baselines call it."""
    return problem.ended.get(score, score)


def _row(
    method: str, results: list[Line], best: Line, problem: Problem, early: float, end: float
) -> str:
    ends = [run["path"][-1] for run in results if run["path"]]
    columns = [method, cell([1e3 * seen["cpu"] / seen["step"] for seen in ends], 1)]
    for name, share in problem.targets:
        times = [time_to(r, name, share * b) for r, b in zip(results, best[name], strict=True)]
        columns.append(cell(times, 2, f"> {end:g}"))
    main = next(iter(problem.scores))
    columns.append(cell([value_at(run, early, main) for run in results]))
    columns += [cell([value_at(run, math.inf, name) for run in results]) for name in problem.scores]
    failed = [run["failed"] for run in results if "failed" in run]
    if failed:
        columns[0] += f" (failed in {len(failed)} of {len(results)}: {failed[0][:60]})"
    return "| " + " | ".join(columns) + " |"


def _simple_row(name: str, results: list[Line], best: Line, problem: Problem) -> str:
    """A baseline is ready when its training has ended; its time is that, or never."""
    columns = [f"{name}, after {cell([r['seconds'] for r in results], 1)} s", ""]
    for target, share in problem.targets:
        pairs = zip(results, best[target], strict=True)
        reached = sum(r[_ended(problem, target)] >= share * b for r, b in pairs)
        columns.append(f"reached {reached}/{len(results)}")
    ends = [cell([r[_ended(problem, score)] for r in results]) for score in problem.scores]
    return "| " + " | ".join([*columns, "", *ends]) + " |"


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


def draw(races: Races, problem: Problem, path: Path) -> None:
    """Median of the first score against CPU seconds, a line per method, a panel per table."""
    figure = Figure(figsize=(max(4.4 * len(races), 7.0), 4.6), layout="constrained")
    panels = figure.subplots(1, len(races), squeeze=False)[0]
    styles = {"ours": "-", "ours (reference)": ":", "peer": "--", "simple": "-."}
    main = next(iter(problem.scores))
    for axes, (title, (runs, simple)) in zip(panels, races.items(), strict=True):
        for index, (method, results) in enumerate(runs.items()):
            group = problem.methods[method].group
            times = [seen["cpu"] for seen in results[0]["path"]]
            columns = [[value_at(run, t, main) for run in results] for t in times]
            width, color = (2.2 if group == "ours" else 1.2), f"C{index % 10}"
            color = "black" if group == "simple" else color
            axes.plot(times, [statistics.median(c) for c in columns], styles[group],
                      color=color, linewidth=width, label=method)  # fmt: skip
        for name, marker in problem.picture.marks.items():
            spent = statistics.median(rows[name]["seconds"] for rows in simple)
            reached = statistics.median(rows[name][_ended(problem, main)] for rows in simple)
            axes.plot(spent, reached, marker, color="black", markersize=5, label=name)
        axes.set(xscale="log", xlabel="CPU seconds of training", title=title)
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.2, max(seen["cpu"] for seen in next(iter(runs.values()))[0]["path"]))
        axes.set_ylim(bottom=problem.picture.bottom)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(problem.picture.label)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(2 * len(races), 4) if len(races) > 1 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=72)
