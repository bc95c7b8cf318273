"""All runs of a command: those that are finished, those to do, and one file of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from .command import device_of, machine
from .record import Line, Record
from .run import Run


class Experiment:
    """The folder ``--out`` of a command.

    It holds ``runs.jsonl`` (every finished run), ``events`` and ``checkpoints`` (see ``Run``),
    the picture, and ``results.json``: the command, the machine and all runs, from which
    ``python -m examples.results`` writes RESULTS.md.

    Without ``--resume`` a folder that already holds runs is moved aside, never overwritten. While a
    command works no other may use its folder (a hidden file beside it is locked).

    Args:
        name: of the command.
        options: its command line, with the flags of ``command.add_common``.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.device = device_of(options)
        self.out: Path = options.out
        self._begun = False
        self._lock = FileLock(self.out.absolute().with_name(f".{self.out.absolute().name}.lock"))
        self.record = Record(self.out / "runs.jsonl", fresh=not options.resume)

    def perform(self, plan: list[Line], work: Callable[[Line, Run], Line]) -> list[Line]:
        """The results of all runs of ``plan``, in its order; what is finished is not repeated.

        Args:
            plan: what defines each run: "method", "seed" and everything that changes its result.
            work: does one.
        """
        with self._alone():
            self._begin()
            todo = [line for line in plan if line not in self.record]
            with tqdm(total=len(plan), initial=len(plan) - len(todo), file=sys.stderr) as bar:
                for line in todo:
                    run = Run(line, self.out, self.device, self.options.resume)
                    bar.set_description(run.name)
                    self.record.add(line, work(line, run))
                    bar.update()
        return [self.record[line] for line in plan]

    def report(
        self,
        parts: Iterable[list[Line]],
        work: Callable[[Line, Run], Line],
        draw: Callable[[Line, Path], object],
        page: Callable[[Line], str],
        picture: str | None = None,
    ) -> None:
        """Perform, publish and draw one part after the other; print the page of the last.

        So there is something to see before all is done.

        Args:
            parts: plans, as of ``perform``; each has the runs of those before it.
            work: as of ``perform``.
            draw: makes a picture of what ``publish`` returns; False: there is nothing to draw.
            page: the text of it.
            picture: name of the picture; default: of the command.
        """
        path, content = self.out / f"{picture or self.name}.png", Line()
        with self._alone():
            for part in parts:
                self.perform(part, work)
                content = self.publish(part)
                if draw(content, path) is not False:
                    print(f"picture: {path}", file=sys.stderr)
        print(page(content))
        print(f"\n{machine(self.device)}\nresults: {self.results}")

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        """No other command uses ``--out`` inside."""
        try:
            self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(
                f"--out {self.out} is in use by another command, which is still at work; name "
                "another folder, or wait until it has ended"
            ) from None
        except OSError as error:
            raise SystemExit(f"--out {self.out} cannot be written: {error}") from error
        try:
            yield
        finally:
            self._lock.release()

    def _begin(self) -> None:
        """Now there is something to write: a command that was mistyped leaves old runs alone."""
        if self._begun:
            return
        if not self.options.resume and self.record.path.exists() and _holds_numbers(self.out):
            _move_aside(self.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.record.path.touch()
        except OSError as error:
            raise SystemExit(f"--out {self.out} cannot be written: {error}") from error
        self._begun = True

    def publish(self, plan: list[Line]) -> Line:
        """Write ``results.json``, all that a reader of a table must know; its content.

        Args:
            plan: the runs that belong to it.
        """
        content = {
            "example": self.name,
            "command": command_line(self.name, sys.argv[1:]),
            "machine": machine(self.device),
            "date": time.strftime("%Y-%m-%d"),
            "runs": [{"run": line, "result": self.record[line]} for line in plan],
        }
        self.out.mkdir(parents=True, exist_ok=True)
        self.results.write_text(json.dumps(content, indent=1) + "\n")
        return content

    @property
    def results(self) -> Path:
        """Where ``publish`` writes."""
        return self.out / "results.json"


def by_seed(plan: list[Line]) -> tuple[list[Line], list[Line]]:
    """The runs of the first seed, and all."""
    return [line for line in plan if line["seed"] == plan[0]["seed"]], plan


def plan_of(content: Line) -> list[Line]:
    """The runs that ``publish`` was given."""
    return [run["run"] for run in content["runs"]]


def by_method(runs: list[Line]) -> dict[str, list[Line]]:
    """The results of ``runs`` (as in results.json), seed by seed, of each method."""
    found: dict[str, list[Line]] = {}
    for run in runs:
        found.setdefault(run["run"]["method"], []).append(run["result"])
    return found


def command_line(name: str, words: Sequence[str]) -> str:
    """How to make the same results elsewhere: without folders and ``--resume``."""
    kept, rest = [f"python -m examples.{name}"], list(words)
    while rest:
        word = rest.pop(0)
        flag, joined, _ = word.partition("=")
        if flag in ("--out", "--data-dir"):
            rest = rest if joined else rest[1:]
        elif flag != "--resume":
            kept.append(word)
    return " ".join(kept)


def _holds_numbers(folder: Path) -> bool:
    """Not what a command leaves that failed before its first run, as where data were missing."""
    return any(file.is_file() and file.stat().st_size for file in folder.rglob("*"))


def _move_aside(folder: Path) -> None:
    when = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    aside = folder.with_name(f"{folder.name}-{when}")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    folder.rename(aside)
    print(f"{folder} held runs: moved to {aside} (--resume goes on with them)", file=sys.stderr)
