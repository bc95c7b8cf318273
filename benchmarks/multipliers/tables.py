"""The tables of ``python -m benchmarks.multipliers``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.multipliers.runs import End, Job

Ends = dict[Job, End]
Value = Callable[[End], float]
TABLES: dict[str, Value] = {
    "Error of the hypergradient, exact at the same (u, v)": lambda end: end.here,
    "Error of the hypergradient, exact at (u, v*(u))": lambda end: end.solved,
    "End": lambda end: end.score,
}
AGAINST = "default"


def cell(values: Sequence[float], warned: int = 0) -> str:
    """Median over the seeds, and their range."""
    if not values or math.isnan(values[0]):
        return ""
    text = f"{statistics.median_high(values):.2g}"
    if len(values) > 1:
        text += f" ({min(values):.2g} to {max(values):.2g})"
    return text + (f", warned {warned}" if warned else "")


def table(title: str, rules: Sequence[str], problems: Sequence[str], ends: Ends) -> str:
    """One row per rule.

    The third column counts the problems on which the rule is below and above the default by more
    than a tenth in every seed.
    """
    value, last = TABLES[title], title == [*TABLES][-1]

    def found(rule: str, problem: str) -> list[End]:
        return [end for job, end in ends.items() if (job.rule, job.problem) == (rule, problem)]

    def values(rule: str, problem: str) -> list[float]:
        return [value(end) for end in found(rule, problem)]

    def standing(rule: str) -> str:
        if rule == AGAINST or AGAINST not in rules:
            return ""
        pairs = [[*zip(values(rule, p), values(AGAINST, p), strict=True)] for p in problems]
        below = sum(bool(each) and all(a < 0.9 * b for a, b in each) for each in pairs)
        above = sum(bool(each) and all(0.9 * a > b for a, b in each) for each in pairs)
        return f"{below}, {above}"

    def cost(rule: str) -> str:
        return f"{found(rule, problems[0])[0].cost:.1f}"

    lines = [f"{title}:", ""]
    lines.append("| rule | cost | below, above | " + " | ".join(problems) + " |")
    lines.append("|---|---|---|" + "---|" * len(problems))
    for rule in rules:
        cells = [
            cell(values(rule, p), sum(end.warned for end in found(rule, p)) if last else 0)
            for p in problems
        ]
        lines.append(f"| {rule} | {cost(rule)} | {standing(rule)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
