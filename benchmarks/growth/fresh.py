"""A function in a process of its own, of which what ran before has left no memory and no caches.

Processes are forked from a server that has imported what they need and computed nothing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ("torch._dynamo", "benchmarks.growth.report", "benchmarks.growth.processes")
SERVER.set_forkserver_preload(list(PRELOADED))
# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Let glibc keep what is freed, as MALLOC_MMAP_MAX_=0 and no trimming do.

    Raises:
        RuntimeError: the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)):
        raise RuntimeError("the allocator is not glibc's, and cannot be told to keep its memory")


def run(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns, all at the same time.

    Raises:
        RuntimeError: one failed, with its traceback; the others, which may wait for it, are ended.
    """
    pipes = [SERVER.Pipe(duplex=False) for _ in functions]
    started = [
        SERVER.Process(target=_answer, args=(theirs, function))
        for (_, theirs), function in zip(pipes, functions, strict=True)
    ]
    for process, (_, theirs) in zip(started, pipes, strict=True):
        process.start()
        theirs.close()
    found: dict[int, Any] = {}
    try:
        while len(found) < len(pipes):
            for place, (ours, _) in enumerate(pipes):
                if place not in found and (ours.poll() or not started[place].is_alive()):
                    found[place] = _read(ours)
            time.sleep(0.02)
    finally:
        for process in started:
            if len(found) < len(pipes):
                process.kill()
            process.join()
    return [found[place] for place in range(len(pipes))]


def _read(pipe: Connection) -> Any:
    try:
        is_error, value = pipe.recv()
    except EOFError:
        is_error, value = True, "the process was ended from outside (too little memory?)"
    if is_error:
        raise RuntimeError(value)
    return value


def _answer(pipe: Connection, function: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        pipe.send((False, function()))
    except Exception:
        pipe.send((True, traceback.format_exc()))
