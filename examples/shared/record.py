"""Finished runs in a file, so that a program that is stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Record:
    """Finished runs by what defines them, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, {}
        if path.exists():
            for text in path.read_text().splitlines():
                line = json.loads(text)
                self.lines[self._key(line["run"])] = line["result"]

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
        with self.path.open("a") as file:
            file.write(json.dumps({"run": run, "result": result}) + "\n")
