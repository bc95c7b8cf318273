"""Tables and pictures of ``README.md`` from what was measured, and from the model on paper."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.growth import constants, paper_model, pictures, point, processes
from benchmarks.growth.rows import Row, Rows, times

PAGE = Path(__file__).with_name("README.md")
NUMBER = "{:.3g}".format
LIMIT = 1.10


def write(rows: Rows, page: Path) -> None:
    """Everything between the markers of ``page``, of the parts that have been measured."""
    text = page.read_text()
    for name, lines in {
        "time": time(rows),
        "slopes": slopes(rows),
        "memory": memory(rows),
        "processes": of_processes(rows),
        "check": check(rows),
        "constants": of_constants(constants.read()),
        "model": paper_model.table([1e8, 1e9, 1e10], [1, 8, 64], "bfloat16"),
        "limits": paper_model.limits([1, 8, 64]),
        "machine": machine(rows),
    }.items():
        if not lines:
            continue
        begin, end = f"<!-- {name}: by benchmarks.growth -->\n", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text, found = re.subn(pattern, lambda _, new=begin + lines + end: new, text, flags=re.S)
        if not found:
            raise ValueError(f"{page} has no markers for {name!r}; take them from {PAGE}")
    page.write_text(text)
    if any(rows.of("parameters")):
        pictures.measured(rows, page.with_name("growth.png"))
    pictures.on_paper(page.with_name("paper.png"))


def tabled(head: Iterable[Any], body: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [[*map(str, line)] for line in (head, *body)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def sizes_of(rows: Rows, part: str) -> list[float]:
    """All that were measured."""
    return sorted({row["size"] for row in rows.of(part)})


def time(rows: Rows) -> str:
    """CPU milliseconds, and the shares that tell the allocator apart."""
    sizes = sizes_of(rows, "parameters")
    body = list[list[str]]()
    for allocator in point.ALLOCATORS:
        for curve in (point.PLAIN, *point.CURVES):
            found = times(rows, curve, allocator)
            if not found:
                continue
            cells = [NUMBER(1e3 * found[s]["cpu"]) if s in found else "" for s in sizes]
            body.append([f"{curve}, ms", allocator, *cells])
            if curve != point.PLAIN:
                ratios = {s: r["ratios"] for s, r in found.items()}
                for to in (point.PLAIN, point.GRADIENT):
                    cells = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*ratios[s][to])
                             if s in ratios else "" for s in sizes]  # fmt: skip
                    body.append([f"{curve} / {to}", allocator, *cells])
                counts = [f"{r['evaluations']:.2f}" for r in found.values()]
                counts += [""] * (len(sizes) - len(counts))
                body.append([f"{curve}, gradients per step", allocator, *counts])
            shares = [
                f"{found[s]['system'] / found[s]['cpu']:.0%}" if s in found else "" for s in sizes
            ]
            body.append([f"{curve}, in the system", allocator, *shares])
    head = ["", "allocator", *(f"{s:,.0f}" for s in sizes)]
    return tabled(head, body) if body else ""


def slope(found: dict[float, Row], last: int = 0) -> float:
    """Of log time in log parameters, over the ``last`` points, by least squares."""
    logs = [(math.log(r["parameters"]), math.log(r["cpu"])) for r in found.values()][-last:]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def slopes(rows: Rows) -> str:
    """Over all decades and over the last, against the promise."""
    body = list[list[str]]()
    for allocator in point.ALLOCATORS:
        for curve in (point.PLAIN, *point.ENGINES):
            found = times(rows, curve, allocator)
            if len(found) < 2:
                continue
            first, last = [*found.values()][-2:]
            decade = f"{first['size']:.0e} to {last['size']:.0e}"
            steep = slope(found, 2)
            kept = "" if curve == point.PLAIN else "kept" if steep <= LIMIT else "**missed**"
            body.append(
                [curve, allocator, f"{slope(found):.2f}", f"{steep:.2f}", decade, str(LIMIT), kept]
            )
    head = ["slope of log time", "allocator", "all", "last decade", "which", "at most", ""]
    return tabled(head, body) if body else ""


def memory(rows: Rows) -> str:
    """Bytes per parameter."""
    sizes = sizes_of(rows, "memory")
    body = list[list[str]]()
    for curve in (point.PLAIN, *point.CURVES):
        for allocator in point.ALLOCATORS:
            found = {r["size"]: r for r in rows.of("memory", curve=curve, allocator=allocator)}
            keys = {"peak_bytes": "peak of tensors", "resident_bytes": "resident"}
            for key, words in keys.items():
                if not found or (key == "peak_bytes" and allocator == point.KEPT):
                    continue
                of = [s for s in sizes if s in found and (key == "peak_bytes" or s >= 1e6)]
                cells = [
                    f"{found[s][key] / found[s]['parameters']:.1f}" if s in of else ""
                    for s in sizes
                ]
                if any(cells):
                    body.append([f"{curve}, {words}", allocator, *cells])
    return tabled(["", "allocator", *(f"{s:,.0f}" for s in sizes)], body) if body else ""


def of_processes(rows: Rows) -> str:
    """Ours / plain training on the same processes."""
    body = list[list[str]]()
    for row in rows.of("processes"):
        ours, plain, n = row[processes.OURS], row[processes.PLAIN], row["parameters"]
        body.append(
            [
                row["kind"],
                row["world"],
                row["dtype"],
                f"{1e3 * ours['cpu']:.1f} / {1e3 * plain['cpu']:.1f}",
                f"{ours['peak_bytes'] / n:.1f} / {plain['peak_bytes'] / n:.1f}",
                f"{ours['messages']:.0f} / {plain['messages']:.0f}",
                f"{ours['payload'] / n:.3f} / {plain['payload'] / n:.3f}",
                f"{ours['sent'] / n:.3f} / {plain['sent'] / n:.3f}",
            ]
        )
    head = ["", "processes", "v in", "CPU ms", "peak, bytes per parameter", "messages"]
    head += ["payload, bytes per parameter", "sent by a ring"]
    return tabled(head, body) if body else ""


def check(rows: Rows) -> str:
    """The model on paper against real steps, but for the peaks that it was made from."""
    body = list[list[str]]()
    for row in rows.of("processes"):
        if row["world"] < 2:
            continue
        for name in (processes.OURS, processes.PLAIN):
            n, world = row["parameters"], row["world"]
            cell = paper_model.Setting(name, n, world, row["kind"], row["dtype"])
            told, seen = cell.vectors(layers=processes.LAYERS), row[name]["peak_bytes"]
            sent, counted = cell.sent_with(probes=0), row[name]["sent"]
            body.append(
                [
                    f"{name}, {row['kind']}, {row['dtype']}",
                    world,
                    *(("", "") if world == 2 else (f"{told / n:.1f}", f"{seen / n:.1f}")),
                    f"{sent / n:.3f}",
                    f"{counted / n:.3f}",
                ]
            )
    head = ["", "processes", "peak, model", "peak, measured", "sent, model", "sent, counted"]
    return tabled(head, body) if body else ""


def of_constants(found: Row) -> str:
    """``constants.json`` as a table."""
    names = {
        "state": "held between steps",
        "peak": "peak",
        "peak, DDP": "peak with DDP",
        "peak, FSDP2": "peak with FSDP2, of all processes, but gathered layers",
        "vector": "moved by vector work in a step",
        "gradients": "gradients in a step",
        "gradients, mean": "the same, probes counted",
    }
    columns = [(d, m) for d in constants.DTYPES for m in (processes.OURS, processes.PLAIN)]
    body = [
        [words, *(NUMBER(found[d][m][key]) if key in found[d][m] else "" for d, m in columns)]
        for key, words in names.items()
    ]
    return tabled(["bytes per parameter", *(f"{m}, {d}" for d, m in columns)], body)


def machine(rows: Rows) -> str:
    """What it was measured on."""
    said = sorted({row["machine"] for row in rows.found.values()})
    return "; ".join(said) + ", other work on the machine.\n" if said else ""
