"""Knobs on a grid: which to try, and which came out best."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from examples.shared.record import Line, Record

Grid = dict[str, Sequence[Any]]


def settings(
    method: str, grid: Grid, tuned: Sequence[Any], options: argparse.Namespace
) -> list[Line]:
    """The whole grid with ``--tune``; else the knobs from the command line or the tuned ones."""
    given = [getattr(options, name) for name in grid]
    one = tuple(t if g is None else g for g, t in zip(given, tuned, strict=True))
    knobs = itertools.product(*grid.values()) if options.tune else iter([one])
    return [{"method": method, **dict(zip(grid, values, strict=True))} for values in knobs]


def print_best(
    methods: Iterable[str], runs: list[Line], record: Record, grid: Grid, by: str
) -> None:
    """Every method's knobs with the least ``by``, as a line of a table of tuned knobs."""
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        best = min(mine, key=lambda run: record[run][by])
        knobs = tuple(best[name] for name in grid)
        print(f'"{method}": {knobs},  # {record[best][by]:.4f}')
