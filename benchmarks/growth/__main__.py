"""How time, memory and bytes on the wire of a step grow: measured here, and on paper beyond.

    python -m benchmarks.growth                      # all of it, an hour or more; then the page
    python -m benchmarks.growth --only processes     # one part
    python -m benchmarks.growth --only page          # tables and pictures of what was measured
    python -m benchmarks.growth --smoke --out results/smoke   # does it run? tiny sizes

What was measured lies in ``--out`` and is not measured again: remove the file, or name another
folder, to begin anew. Parts:

    parameters   CPU time of a step from 1e4 to 1e8 parameters, with glibc's allocator as it comes
                 and with one that keeps what it has, each point in a process of its own
    memory       peak of all tensors, for the same sizes
    processes    CPU time, memory and bytes on the wire on 1, 2 and 4 processes, DDP and FSDP2
    constants    bytes and passes per parameter, from which the model on paper starts
    page         the tables and pictures of README.md, the model's too
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.growth import constants, point, processes, report
from benchmarks.growth.rows import Rows
from examples.shared import command

SIZES = (1e4, 1e5, 1e6, 1e7, 1e8)
WORLDS = (1, 2, 4)
CORRECTED_UP_TO = 1e7
PARTS = ("parameters", "memory", "processes", "constants", "page")
Task = tuple[str, Callable[[], Any], dict[str, Any]]


def parameters(sizes: list[float], seconds: float) -> list[Task]:
    """Each curve at each size, with both allocators; the largest first."""
    return [
        (
            f"seconds, {size:.0e}, {curve}, {allocator}",
            partial(
                point.in_fresh_process,
                point.timed,
                allocator,
                size=size,
                curve=curve,
                seconds=seconds,
            ),
            {"part": "parameters", "size": size, "curve": curve, "allocator": allocator},
        )
        for size in sizes
        for curve in point.CURVES
        for allocator in point.ALLOCATORS
        if curve != point.CORRECTED or size <= CORRECTED_UP_TO
    ]


def memory(sizes: list[float], seconds: float) -> list[Task]:
    """The allocator matters to what is resident alone, where vectors are large."""
    del seconds
    return [
        (
            f"bytes, {size:.0e}, {curve}, {allocator}",
            partial(point.in_fresh_process, point.held, allocator, size=size, curve=curve),
            {"part": "memory", "size": size, "curve": curve, "allocator": allocator},
        )
        for size in sizes
        for curve in (*point.CURVES, point.PLAIN)
        for allocator in point.ALLOCATORS
        if curve != point.CORRECTED or size <= CORRECTED_UP_TO
        if allocator == point.AS_IT_COMES or size >= 1e7
    ]


def of_processes(size: float, worlds: list[int], seconds: float) -> list[Task]:
    settings = [(kind, w, "float32") for w in worlds for kind in processes.KINDS]
    settings += [(kind, 2, "bfloat16") for kind in processes.KINDS if 2 in worlds]
    return [
        (
            f"{kind}, {world} processes, {size:.0e}, {dtype}",
            partial(processes.measured, size, kind, world, seconds, dtype),
            {"part": "processes"},
        )
        for kind, world, dtype in settings
    ]


def options_of() -> argparse.Namespace:
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default: all")
    add("--sizes", nargs="+", type=float, default=list(SIZES), help="parameters of v")
    add("--process-size", type=float, default=1e6, help="parameters on several processes (1e6)")
    add("--worlds", nargs="+", type=command.count, default=list(WORLDS), help="processes (1 2 4)")
    add("--seconds", type=float, default=3.0, help="CPU time per point, after warming up (3)")
    add("--out", type=Path, default=Path("results/growth"), help="folder (results/growth)")
    add("--page", type=Path, default=report.PAGE, help="to write the tables into")
    add("--smoke", action="store_true", help="does it run? tiny sizes; the page goes to --out")
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.process_size, options.worlds = [1e3], 1e3, [2]
        options.seconds, options.page = 0.0, options.out / "README.md"
        options.out.mkdir(parents=True, exist_ok=True)
        options.page.write_text(report.PAGE.read_text())
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(1)
    rows = Rows(options.out / "rows.jsonl")
    kept = options.out / "constants.json" if options.smoke else constants.FILE
    sizes = sorted(options.sizes, reverse=True)
    tasks: list[Task] = []
    worlds = options.worlds if "processes" in options.only else [2]
    if {"processes", "constants"} & {*options.only}:
        tasks += of_processes(options.process_size, worlds, options.seconds)
    for part in (parameters, memory):
        if part.__name__ in options.only:
            tasks += part(sizes, options.seconds)
    now = datetime.now(timezone.utc).date().isoformat()
    for key, measure, about in (bar := tqdm(tasks, unit="point")):
        bar.set_postfix_str(key)
        rows.once(key, measure, date=now, machine=command.machine(), **about)
    if "constants" in options.only:
        found = constants.counted(options.process_size)
        constants.write(constants.with_processes(found, rows.of("processes")), kept)
    if "page" in options.only:
        report.write(rows, options.page)
    print(f"{len(rows.found)} points in {rows.path}; page: {options.page}")


if __name__ == "__main__":
    main()
