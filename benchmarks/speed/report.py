"""Tables and figure of ``benchmarks/speed/README.md`` from what ``make bench`` measured.

    python -m benchmarks.speed.report                       # results/speed.json
    python -m benchmarks.speed.report one.json another.json

Everything between the markers of the page is written here; the words around them are by hand.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.speed import methods, problems
from examples.shared import command

PAGE = Path(__file__).with_name("README.md")
Entry = dict[str, Any]
Results = dict[str, dict[str, Entry]]  # by group and name
SMALL, LARGE, CNN, DEFAULT_ATTENTION, MATH, _ = problems.BY_KIND
ALONE = "plain training of v"


def read(paths: list[Path]) -> tuple[Results, Entry]:
    """All measurements, and the last file's description of the machine."""
    results: Results = {}
    data: Entry = {}
    for path in paths:
        data = json.loads(path.read_text())
        for entry in data["benchmarks"]:
            row = entry["extra_info"] | {"seconds": entry["stats"]["median"]}
            results.setdefault(entry["group"], {})[entry["name"]] = row
        for failure in data["failures"]:
            results.setdefault(failure["group"], {})[failure["name"]] = failure
    return results, data


def ratio(row: Entry | None, to: str = "gradient") -> float:
    """Median of the ratios to what ran just before; NaN where it was not measured."""
    return row["ratios"][to][1] if row and to in row.get("ratios", {}) else math.nan


def against(row: Entry | None, unit: Entry | None, key: str) -> float:
    return row[key] / unit[key] if row and unit and key in row and unit.get(key) else math.nan


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def micro(results: Results, absent: dict[str, str]) -> str:
    parts = list[str]()
    for kind in problems.BY_KIND:
        rows = results.get(kind, {})
        unit = rows.get(ALONE)
        if unit is None:
            continue
        milliseconds = 1e3 * unit["reference_seconds"]["gradient"]
        parts += [
            f"### {kind}: {unit['parameters']:,} parameters, one gradient {milliseconds:.2g} ms\n",
            "| one step of | time | time, middle half | FLOPs | saved for backward | peak memory "
            "| first step |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in (ALONE, *methods.METHODS):
            row = rows.get(name)
            if row is None:
                continue
            if "error" in row:
                parts.append(f"| {name} | fails: {row['error'][:150]} | | | | | |")
                continue
            low, middle, high = row["ratios"]["gradient"]
            flops = 1.0 if row is unit else against(row, unit, "flops")
            cells = [flops, *(against(row, unit, k) for k in ("saved_bytes", "peak_bytes"))]
            # The first step's peak over that of later steps of plain training, as the others are.
            cells.append(row["first_peak_bytes"] / unit["peak_bytes"])
            spread = f"{number(low)} to {number(high)}"
            text = " | ".join([number(middle), spread, *map(number, cells)])
            parts.append(f"| {name} | {text} |")
        parts += [f"| {name} | not measured: {why} | | | | | |" for name, why in absent.items()]
        parts.append("")
    return "\n".join(parts)


def targets(results: Results) -> str:
    """Each promise, what was measured, and whether it was kept."""

    def row(kind: str, name: str) -> Entry | None:
        return results.get(kind, {}).get(name)

    def compared(kind: str, name: str, key: str) -> float:
        return against(row(kind, name), row(kind, ALONE), key)

    lines = list[tuple[str, float, float]]()
    fd, double, ours = methods.FINITE, methods.DOUBLE, methods.OURS
    for kind in (SMALL, LARGE, CNN, DEFAULT_ATTENTION):
        lines.append((f"FLOPs, {fd}, {kind}", 3.3, compared(kind, fd, "flops")))
    for kind in (SMALL, LARGE, CNN, MATH):
        lines.append((f"FLOPs, {double}, {kind}", 4.3, compared(kind, double, "flops")))
    for kind, limit in ((SMALL, 1.10), (LARGE, 1.03)):
        lines.append((f"time over the floor, {kind}", limit, ratio(row(kind, ours), "floor")))
    for kind in problems.BY_KIND:
        lines.append((f"peak memory, {fd}, {kind}", 1.25, compared(kind, fd, "peak_bytes")))
        if kind != DEFAULT_ATTENTION:
            double_peak = compared(kind, double, "peak_bytes")
            lines.append((f"peak memory, {double}, {kind}", 2.2, double_peak))
    for kind in problems.BY_KIND:
        share = ratio(row(kind, ours)) / ratio(row(kind, methods.TORCHOPT_CG))
        lines.append((f"time over {methods.TORCHOPT_CG}, {kind}", 0.25, share))
    head = ["| promise | at most | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *(_target(*line) for line in lines)]) + "\n"


def _target(name: str, limit: float, value: float) -> str:
    if math.isnan(value):
        return f"| {name} | {limit} | | not measured |"
    return f"| {name} | {limit} | {value:.2f} | {'kept' if value <= limit else '**missed**'} |"


def curves(rows: dict[str, Entry]) -> dict[str, list[Entry]]:
    """Measured points by curve, by size."""
    found: dict[str, list[Entry]] = {}
    for row in sorted((r for r in rows.values() if "error" not in r), key=lambda r: r["size"]):
        found.setdefault(row["curve"], []).append(row)
    return found


def growth(results: Results) -> str:
    parts = list[str]()
    for group, rows in results.items():
        if not group.startswith("growth"):
            continue
        sizes = sorted({r["size"] for r in rows.values() if "error" not in r})
        header = " | ".join(f"{size:,.0f}" for size in sizes)
        parts += [f"### {group.capitalize()}\n", f"| | {header} |", "|---|" + "---|" * len(sizes)]
        for name, points in curves(rows).items():
            by_size = {p["size"]: p for p in points}
            for what, cell in (
                ("ms", lambda p: number(1e3 * p["seconds"])),
                ("plain gradients", lambda p: number(ratio(p))),
                ("peak MB", lambda p: number(p["peak_bytes"] / 1e6)),
            ):
                cells = (cell(by_size[s]) if s in by_size else "" for s in sizes)
                parts.append(f"| {name}, {what} | " + " | ".join(cells) + " |")
        parts += [f"\n{r['name']}: fails: {r['error']}" for r in rows.values() if "error" in r]
        parts.append("")
    return "\n".join(parts)


def draw(results: Results, path: Path) -> None:
    """Time and memory of a step along each direction of growth, with slope one for the eye."""
    groups = [g for g in results if g.startswith("growth")]
    figure = Figure(figsize=(3.2 * len(groups), 5.6), layout="constrained")
    axes = figure.subplots(2, len(groups), sharex="col", squeeze=False)
    for (top, bottom), group in zip(axes.T, groups, strict=True):
        found = curves(results[group])
        for (name, points), marker in zip(found.items(), "osD^", strict=False):
            sizes = [p["size"] for p in points]
            look = {"marker": marker, "markersize": 4}
            top.loglog(sizes, [1e3 * p["seconds"] for p in points], label=name, **look)
            bottom.loglog(sizes, [p["peak_bytes"] / 1e6 for p in points], **look)
        points = max(found.values(), key=len)
        first, last = points[0]["size"], points[-1]["size"]
        for axis in (top, bottom):
            low, high = axis.get_ylim()
            high = max(high, 10 * low)  # at least a decade: a flat curve has to look flat
            axis.loglog([first, last], [high * first / last, high], ":", color="0.6", linewidth=1)
            axis.set_ylim(low, high)
            axis.spines[["top", "right"]].set_visible(False)
        top.legend(frameon=False, fontsize=7)
        bottom.set_xlabel(group.removeprefix("growth with "))
    axes[0, 0].set_ylabel("ms per step")
    axes[1, 0].set_ylabel("peak of all tensors, MB")
    figure.savefig(path, dpi=90)


def machine(data: Entry) -> str:
    info, commit = data["machine_info"], data["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    changed = " with changes" if commit["dirty"] else ""
    return (
        f"{versions}, Python {info['python_version']}, {info['machine'].replace('_', '-')}, "
        f"{info['threads']} thread, commit {commit['id'][:7]}{changed}.\n"
    )


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("files", type=Path, nargs="*", default=[Path("results/speed.json")])
    parser.add_argument("--page", type=Path, default=PAGE, help="to write the tables into")
    options = parser.parse_args()
    results, data = read(options.files)
    page = options.page.read_text()
    for name, text in {
        "machine": machine(data),
        "targets": targets(results),
        "micro": micro(results, data["absent"]),
        "growth": growth(results),
    }.items():
        begin, end = f"<!-- {name}: written by make bench-report -->\n", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page = re.sub(pattern, lambda _, new=begin + text + end: new, page, flags=re.DOTALL)
    options.page.write_text(page)
    if any(group.startswith("growth") for group in results):
        draw(results, options.page.with_name("growth.png"))


if __name__ == "__main__":
    main()
