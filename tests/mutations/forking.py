"""Pytest in a fork of a process that has the libraries imported: seconds less for every run.

``python forking.py`` reads orders from its standard input, one JSON per line: ``arguments`` of
pytest, ``folder``, ``environment`` and ``output`` (a file). It answers with the process's number
and then with its exit status, a line each. The package under test is imported in the fork alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence

# No plugin of pytest's: it wants to rewrite their assertions, and warns if it cannot.
_LIBRARIES = ("torch", "numpy", "scipy.optimize", "pytest")


class Slow(Exception):
    """The tests took longer than allowed."""


class Nursery:
    """The process that forks; one run at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        arguments: Sequence[str],
        folder: pathlib.Path,
        environment: Mapping[str, str],
        limit: float | None,
    ) -> tuple[int, str]:
        """Exit status and output of pytest; ``Slow`` after ``limit`` seconds."""
        output = folder / "output.txt"
        order = {"arguments": list(arguments), "folder": str(folder), "output": str(output)}
        assert self._process.stdin is not None
        line = json.dumps(order | {"environment": dict(environment)}) + "\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        number = self._answer(None)
        assert number is not None
        status = None
        try:
            status = self._answer(limit)
        finally:
            if status is None:
                os.killpg(number, signal.SIGKILL)
                self._answer(None)
        if status is None:
            raise Slow
        return status, output.read_text(errors="replace")

    def _answer(self, limit: float | None) -> int | None:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            return None
        # Unbuffered, or a line that has been read ahead would not wake ``select``.
        text = b""
        while not text.endswith(b"\n"):
            piece = os.read(self._process.stdout.fileno(), 1)
            if not piece:
                raise RuntimeError("the process that forks has ended")
            text += piece
        return int(text)

    def close(self) -> None:
        """End it."""
        with self._process:  # closes its input, at which it ends
            pass


def _born(order: dict[str, str], arguments: list[str]) -> int:
    """In the fork: run pytest as a process of its own would."""
    os.setsid()
    os.chdir(order["folder"])
    target = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, place in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, place)
    sys.argv = ["pytest", *arguments]
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    return int(importlib.import_module("pytest").main(arguments))


def main() -> None:
    """Fork on demand until the input ends."""
    for library in _LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    here = str(pathlib.Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != here]
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(order["environment"])
            status = 70
            try:
                status = _born(order, order["arguments"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
