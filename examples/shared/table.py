"""Markdown tables of medians over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def markdown(header: list[str], rows: Mapping[str, list[str]]) -> str:
    """A table whose rows start with their names."""
    lines = [header, *([name, *cells] for name, cells in rows.items())]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(header) + "|", *texts[1:]])


def spread(values: list[float], number: Callable[[float], str]) -> str:
    """The median as ``number`` writes it, and the range where that shows one; "" of nothing."""
    if not values:
        return ""
    middle, least, most = (number(f(values)) for f in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least} to {most})"
