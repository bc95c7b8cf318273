"""Finished runs in a file, so that a program that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def place_of(run: Line) -> str:
    """A name for the files of a run, another one for every run."""
    mark = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]
    readable = "".join(c if c.isalnum() else "_" for c in str(run["method"]))
    return f"{readable}-seed{run['seed']}-{mark}"


class Record:
    """Finished runs by what defines them, one JSON line each.

    Args:
        path: of the file.
        fresh: what is there does not count.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path, self.lines = path, {}
        if path.exists() and not fresh:
            for number, text in enumerate(path.read_text().splitlines(), 1):
                try:
                    line = json.loads(text)
                    self.lines[self._key(line["run"])] = line["result"]
                except (ValueError, KeyError, TypeError):  # as a run that was killed leaves it
                    print(f"{path}, line {number}, is no finished run: left out", file=sys.stderr)

    @staticmethod
    def _key(run: Line) -> str:
        return json.dumps(run, sort_keys=True)

    def __contains__(self, run: Line) -> bool:
        return self._key(run) in self.lines

    def __getitem__(self, run: Line) -> Line:
        return self.lines[self._key(run)]

    def runs(self) -> list[tuple[Line, Line]]:
        """All finished runs, (what defines it, its result)."""
        return [(json.loads(key), result) for key, result in self.lines.items()]

    def add(self, run: Line, result: Line) -> None:
        self.lines[self._key(run)] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"  # the last line was cut
            file.write(start + json.dumps({"run": run, "result": result}).encode() + b"\n")
