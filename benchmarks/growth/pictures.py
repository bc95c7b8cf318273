"""Pictures of ``README.md``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.growth import point
from benchmarks.growth.paper_model import H100, KINDS, METHODS, Setting
from benchmarks.growth.processes import OURS
from benchmarks.growth.rows import Rows, times

COLOURS = {
    point.PLAIN: "0.45",
    "finite differences": "#0072b2",
    "double backward": "#d55e00",
    point.CORRECTED: "#56b4e9",
}
WORLDS = {1: "#009e73", 8: "#e69f00", 64: "#cc79a7"}


def measured(rows: Rows, path: Path) -> None:
    """Time per parameter, time over plain training's, bytes per parameter."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    time, ratio, memory = figure.subplots(1, 3)
    for curve, colour in COLOURS.items():
        for allocator, line in zip(point.ALLOCATORS, ("-", "--"), strict=True):
            found = times(rows, curve, allocator).values()
            look: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3.5}
            look |= {"linestyle": line, "label": f"{curve}, {allocator}"}
            n = [r["parameters"] for r in found]
            time.loglog(n, [1e9 * r["cpu"] / r["parameters"] for r in found], **look)
            if curve != point.PLAIN:
                ratio.semilogx(n, [r["ratios"][point.PLAIN][1] for r in found], **look)
        held = rows.of("memory", curve=curve, allocator=point.AS_IT_COMES)
        of = sorted((r["parameters"], r["peak_bytes"] / r["parameters"]) for r in held)
        look = {"color": colour, "marker": "o", "markersize": 3.5, "label": curve}
        if of:
            memory.semilogx([n for n, _ in of], [b for _, b in of], **look)
    time.set_title("CPU ns per parameter and step (flat: proportional)", fontsize=9)
    ratio.set_title("time over plain training's", fontsize=9)
    memory.set_title("peak of all tensors, bytes per parameter", fontsize=9)
    time.legend(frameon=False, fontsize=6.5)
    if memory.lines:
        memory.legend(frameon=False, fontsize=6.5)
    for axes in (time, ratio, memory):
        axes.set_xlabel("lower parameters", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    ratio.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


def on_paper(path: Path) -> None:
    """Bytes held, bytes sent and time over plain training's, by the model."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    held, sent, ratio = figure.subplots(1, 3)
    sizes = [10 ** (8 + k / 20) for k in range(61)]
    for world, colour in WORLDS.items():
        for kind, line in zip(KINDS, (":", "-"), strict=True):
            if world == 1 and kind == KINDS[1]:
                continue
            line = "-" if world == 1 else line
            cells = {m: [Setting(m, n, world, kind) for n in sizes] for m in METHODS}
            words = f"{world} GPUs, {kind}" if world > 1 else "1 GPU"
            for method, width in zip(METHODS, (1.8, 0.8), strict=True):
                look: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": width}
                name = words if method == OURS else None
                held.loglog(sizes, [c.held / 1e9 for c in cells[method]], label=name, **look)
                if world > 1:
                    sent.loglog(sizes, [c.sent / 1e9 for c in cells[method]], label=name, **look)
            over = [
                ours.seconds / plain.seconds if ours.fits else math.nan
                for ours, plain in zip(*cells.values(), strict=True)
            ]
            ratio.semilogx(sizes, over, color=colour, linestyle=line, linewidth=1.8, label=words)
    held.axhline(H100.memory / 1e9, color="0.3", linewidth=0.8)
    held.text(1.1e8, 1.1 * H100.memory / 1e9, "80 GB", fontsize=8, color="0.3")
    held.set_title("model: GB held per GPU (thin: plain training)", fontsize=9)
    sent.set_title("model: GB sent per GPU and step", fontsize=9)
    ratio.set_title("model: time over plain training's, where it fits", fontsize=9)
    ratio.set_ylim(bottom=0)
    for axes in (held, sent, ratio):
        axes.set_xlabel("parameters of v, bfloat16", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=100)
