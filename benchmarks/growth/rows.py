"""What was measured, a line each: a command that was cut goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.growth import point

Row = dict[str, Any]


class Rows:
    """A file of rows, each under the words that say what it is of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[str, Row] = {r["key"]: r for r in map(json.loads, lines)}

    def once(self, key: str, measure: Callable[[], Row], **about: Any) -> Row:
        """The row of this key, measured if it is not there yet; ``about`` is written into it."""
        if key not in self.found:
            self.found[key] = {"key": key, **about, **measure()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(self.found[key]) + "\n")
        return self.found[key]

    def of(self, part: str, **about: Any) -> Iterator[Row]:
        """The rows of a part, of which these things are true."""
        for row in self.found.values():
            if row["part"] == part and all(row[key] == value for key, value in about.items()):
                yield row


def times(rows: Rows, curve: str, allocator: str) -> dict[float, Row]:
    """By size; plain training's are those of the processes that ran the first curve."""
    own = curve if curve in point.CURVES else point.FIRST
    found = rows.of("parameters", curve=own, allocator=allocator)
    return {row["size"]: row | row[curve] for row in sorted(found, key=lambda r: r["size"])}
