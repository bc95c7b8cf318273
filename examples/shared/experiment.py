"""All runs of a command: those that are finished, those to do, and one file of results."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .command import device_of, machine
from .record import Line, Record
from .run import Run


class Experiment:
    """The folder ``--out`` of a command.

    It holds ``runs.jsonl`` (every finished run), ``events`` and ``checkpoints`` (see ``Run``),
    the picture, and ``results.json``: the command's options, the machine and all runs, from
    which ``python -m examples.results`` writes the tables of RESULTS.md.

    Without ``--resume`` a folder that already holds runs is moved aside, never overwritten.

    Args:
        name: of the command.
        options: its command line, with the flags of ``command.add_common``.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.device = device_of(options)
        self.out: Path = options.out
        if not options.resume and (self.out / "runs.jsonl").exists():
            _move_aside(self.out)
        self.record = Record(self.out / "runs.jsonl")

    def perform(self, plan: list[Line], work: Callable[[Line, Run], Line]) -> list[Line]:
        """The results of all runs of ``plan``, in its order; what is finished is not repeated.

        Args:
            plan: what defines each run: "method", "seed" and everything that changes its result.
            work: does one.
        """
        todo = [line for line in plan if line not in self.record]
        with tqdm(total=len(plan), initial=len(plan) - len(todo), file=sys.stderr) as bar:
            for line in todo:
                run = Run(line, self.out, self.device, self.options.resume)
                bar.set_description(run.name)
                self.record.add(line, work(line, run))
                bar.update()
        return [self.record[line] for line in plan]

    def publish(self, plan: list[Line], **facts: Any) -> Path:
        """Write ``results.json``; its path.

        Args:
            plan: the runs that belong to it.
            facts: what else a reader must know, as JSON.
        """
        path = self.out / "results.json"
        asked = {k: v for k, v in vars(self.options).items() if not isinstance(v, Path)}
        content = {
            "command": self.name,
            "options": asked,
            "machine": machine(self.device),
            "date": time.strftime("%Y-%m-%d"),
            **facts,
            "runs": [{"run": line, "result": self.record[line]} for line in plan],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def _move_aside(folder: Path) -> None:
    when = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    aside = folder.with_name(f"{folder.name}-{when}")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    folder.rename(aside)
    print(f"{folder} held runs: moved to {aside} (--resume goes on with them)", file=sys.stderr)
