"""A Python command in a fork of a process that has the libraries imported: seconds less for each.

``python forking.py LIBRARY ...`` reads orders from its standard input, one JSON per line: the
``words`` after ``python``, ``folder``, ``environment``, ``output`` and ``errors`` (files). It
answers with the process's number and then with its exit status, a line each. The package under
test is imported in the fork alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# No plugin of pytest's: it wants to rewrite their assertions, and warns if it cannot.
LIBRARIES = ("torch", "torch._dynamo", "numpy", "scipy.optimize", "pytest")


class Slow(Exception):
    """The command took longer than allowed."""


class Ended(NamedTuple):
    """A command that has ended."""

    status: int
    output: str
    errors: str


class Nursery:
    """The process that forks; one command at a time."""

    def __init__(self, *libraries: str) -> None:
        # Pytest in a fork is no worker of a pytest-xdist that may have called us.
        alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(libraries or LIBRARIES)],
            env=alone | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        words: Sequence[str],
        folder: pathlib.Path,
        environment: Mapping[str, str],
        limit: float | None = None,
        *,
        beside: pathlib.Path | None = None,
    ) -> Ended:
        """What ``python -m MODULE ...`` would do in ``folder``; ``Slow`` after ``limit`` seconds.

        Args:
            words: the module and its arguments.
            folder: where it is called.
            environment: what changes in it.
            limit: in seconds.
            beside: where what it prints is kept; default ``folder``.
        """
        texts = [(beside or folder) / name for name in ("output.txt", "errors.txt")]
        order = {"words": list(words), "folder": str(folder), "environment": dict(environment)}
        order |= {"output": str(texts[0]), "errors": str(texts[1])}
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(order) + "\n").encode())
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
        return Ended(status, *(text.read_text(errors="replace") for text in texts))

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


def _born(order: dict[str, str], words: list[str]) -> None:
    """In the fork: run the module as a process of its own would."""
    os.setsid()
    os.chdir(order["folder"])
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    opened = (os.open(os.devnull, os.O_RDONLY), *(os.open(order[k], writing) for k in _TEXTS))
    for place, source in enumerate(opened):
        os.dup2(source, place)
    sys.path[:0] = [order["folder"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


_TEXTS = ("output", "errors")


def _status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return int(ended.code or 0)
    print(ended.code, file=sys.stderr)
    return 1


def main() -> None:
    """Fork on demand until the input ends."""
    for library in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    here = str(pathlib.Path(__file__).parent)
    sys.path[:] = [place for place in sys.path if place != here]
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(order["environment"])
            status = 0
            try:
                _born(order, order["words"])
            except SystemExit as ended:
                status = _status(ended)
            except BaseException:
                traceback.print_exc()
                status = 70
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
