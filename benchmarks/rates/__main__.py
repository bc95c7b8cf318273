"""Error of the hypergradient against iterations, for every method, under its theoretical bound.

    python -m benchmarks.rates                   # the table and benchmarks/rates/rates.png

The lower level is quadratic with condition number 9: gradient steps contract by q = 4/5, conjugate
gradients by rho = 1/2. Per method: the slope of its error, the slope of the theory's law at the
same counts, and the largest error over bound, which must not exceed 1.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm

from benchmarks.rates.curves import KAPPA, Curve, solvers, together
from benchmarks.rates.penalties import one_loop, penalties
from benchmarks.rates.samples import sampled
from examples.shared import command

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "solver": ("Solving the adjoint equation at v*", "iterations k"),
    "together": ("t lower steps, then t iterations", "lower steps t"),
    "sampled": ("Random samples of the lower level", "steps k or samples J"),
    "penalty": ("Penalties: bias", "weight γ"),
    "one loop": ("Penalties: all variables move together", "lower steps t"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKS = "os^Dvx"


def row(curve: Curve) -> str:
    """A line of the table."""
    slopes = ("", "")
    if curve.law is not None:
        # Slopes of what stays constant are rounding errors: no -0.000.
        slopes = tuple(f"{x + 0.0:.3f}" for x in (round(curve.slope, 3), curve.expected_slope))
    title = PANELS[curve.panel][0]
    formula = curve.formula or "none, a bound only"
    return (
        f"| {title} | {curve.name} | {formula} | {slopes[0]} | {slopes[1]} | "
        f"{curve.worst_ratio:.3f} |"
    )


def draw(axes: Any, curves: list[Curve]) -> None:
    """One panel: errors with marks, bounds dashed in the same colour."""
    for number, curve in enumerate(curves):
        colour, every = COLOURS[number], max(1, len(curve.counts) // 9)
        style = {"color": colour, "linewidth": 1.4}
        mark: dict[str, Any] = {"marker": MARKS[number], "markersize": 4.5, "fillstyle": "none"}
        start = number * every // len(curves)  # curves that coincide show all their marks
        axes.plot(
            curve.counts, curve.errors, label=curve.name, markevery=(start, every), **style, **mark
        )
        axes.plot(curve.counts, curve.bounds, "--", color=colour, linewidth=0.9, alpha=0.7)
    title, label = PANELS[curves[0].panel]
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label)
    axes.set_yscale("log")
    if any(c.powers for c in curves):
        axes.set_xscale("log")
    squared = curves[0].panel == "sampled"
    axes.set_ylabel("mean of ‖p − p*‖²" if squared else "‖p − p*‖")
    axes.grid(color="#dddddd", linewidth=0.6)
    # Below, not inside: lines cross every corner of some panel.
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    axes.legend(fontsize=9, ncols=2, columnspacing=1.0, frameon=False, **place)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    beside = Path(__file__).with_name("rates.png")
    parser.add_argument("--figure", type=Path, default=beside, help="where to draw")
    families = {f.__name__: f for f in (solvers, together, sampled, penalties, one_loop)}
    parser.add_argument("--only", nargs="+", choices=families, default=list(families))
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    panels = defaultdict[str, list[Curve]](list)
    for family in tqdm(options.only, unit="panel"):
        for curve in families[family]():
            panels[curve.panel].append(curve)

    figure, grid = plt.subplots(2, 3, figsize=(14, 9.4), layout="constrained")
    for axes, curves in zip(grid.flat, panels.values(), strict=False):
        draw(axes, curves)
    words = grid.flat[-1]
    words.axis("off")
    words.text(
        0.04, 0.92,
        "p: hypergradient, p*: exact\n\nsolid with marks: error\ndashed, same colour: bound\n\n"
        f"condition number {KAPPA:g}\ngradient steps: q = 4/5\nconjugate gradients: ρ = 1/2",
        va="top", fontsize=11, linespacing=1.4,
    )  # fmt: skip
    figure.savefig(options.figure, dpi=110)

    print("\n| panel | method | law | measured slope | slope of the law | worst error / bound |")
    print("|---|---|---|---|---|---|")
    print("\n".join(row(curve) for curves in panels.values() for curve in curves))
    print(f"\nfloat64; {command.machine()}; {options.figure.name} drawn")


if __name__ == "__main__":
    main()
