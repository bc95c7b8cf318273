"""Pictures of a run and of a check, in one call each; with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .checks.report import HypergradientReport
from .metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 2000
"""Entries of u that ``plot_report`` draws at most."""
_DECADE = 10.0

_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("losses", {"upper_loss": "f(u, v)", "lower_loss": "g(u, v)"}),
    (
        "residuals",
        {
            "adjoint_residual_norm": r"certificate $\|\nabla_v f + Hq\|$",
            "residual_norm": r"$\|\nabla_v g\|$",
        },
    ),
    (
        "relative certificate",
        {"relative_certificate": r"$\|\nabla_v f + Hq\| \,/\, \|\nabla_v f\|$"},
    ),
    ("hypergradient", {"upper_grad_norm": r"$\|\nabla_u f + Jq\|$"}),
)


def plot_metrics(history: Iterable[Metrics | Mapping[str, float]]) -> Figure:
    """Losses of both levels, certificate and hypergradient of a run, against its cost.

    Four panels over the gradient evaluations since construction: f and g; the certificate beside
    ``||grad_v g||``; the certificate relative to ``||grad_v f||`` with a line at 1, where q = 0
    stands (NaN and infinite numbers are left out, as the hypergradient after a ``lower_step`` is).
    Axes are logarithmic where no number is negative and the positive ones span a factor of ten; a
    zero then falls off the lower edge.

    Args:
        history: ``optimizer.metrics`` of each step that is to be seen, in a list or whatever else
            can be walked through; also as ``metrics.as_dict()``, as loggers have them.

    Returns:
        The figure, with pyplot's ``show``; ``figure.savefig("run.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
        TypeError: an entry has no metrics, or ``history`` is that of one step.

    Example:
        >>> import torch
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> u, v = (torch.zeros(1, requires_grad=True) for _ in range(2))
        >>> optimizer, history = PenaltyBilevelOptimizer([u], [v]), []
        >>> for _ in range(10):
        ...     loss = optimizer.step(lambda: (u**2 + v**2).sum(), lambda: ((1 - u - v)**2).sum())
        ...     history.append(optimizer.metrics)
        >>> figure = plot_metrics(history)  # doctest: +SKIP
    """
    plt = _pyplot("plot_metrics")
    given: Any = history
    if isinstance(given, (Metrics, Mapping)):
        raise TypeError(
            f"history is {type(given).__name__}, the numbers of one step; keep optimizer.metrics "
            "of each in a list"
        )
    rows = [_row(entry, i) for i, entry in enumerate(history)]
    if not rows:
        raise ValueError(
            "history is empty, so there is nothing to draw; append optimizer.metrics after a step"
        )
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (title, series) in zip(axes.flat, _PANELS, strict=True):
        _draw(axis, rows, series)
        axis.set_title(title, loc="left", fontsize="medium")
    axes[1, 0].axhline(1.0, color="grey", linestyle=":", label="q = 0")
    axes[1, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("gradient evaluations")
    return figure


def plot_report(report: HypergradientReport) -> Figure:
    """What ``check_hypergradient`` found: the estimate against the exact hypergradient.

    Left every entry of the estimate over that of implicit differentiation, on the diagonal where
    they agree (evenly spaced entries of a large u). Right, where the lower level was re-solved, the
    slopes of f(u, v*(u)) by each way, with their uncertainty.

    Args:
        report: of ``optimizer.check_hypergradient(...)``.

    Returns:
        The figure, with pyplot's ``show``; its title is the verdict, with the findings' names.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is none.
    """
    plt = _pyplot("plot_report")
    given: Any = report
    if not isinstance(given, HypergradientReport):
        raise TypeError(
            f"report is {type(given).__name__}; give what optimizer.check_hypergradient(...) "
            "returned"
        )
    count = 1 + bool(report.slopes)
    figure, axes = plt.subplots(
        1, count, figsize=(4.5 * count, 4.5), squeeze=False, layout="constrained"
    )
    _entries(axes[0, 0], report)
    if report.slopes:
        _slopes(axes[0, 1], report)
    lines = [str(report).split("\n")[0].removeprefix("Hypergradient check: ")]
    lines += ["findings: " + ", ".join(f.name for f in report.findings)] * bool(report.findings)
    figure.suptitle("\n".join(lines), fontsize="medium", wrap=True)
    return figure


def _pyplot(caller: str) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} draws with matplotlib, which is not installed; "
            'pip install "torch_penalty_bilevel[plot]"'
        ) from error
    return plt


def _row(entry: Any, number: int) -> Mapping[str, float]:
    row: Any = entry.as_dict() if isinstance(entry, Metrics) else entry
    wanted = {"gradient_evaluations", *(name for _, series in _PANELS for name in series)}
    if not isinstance(row, Mapping) or wanted - set(row):
        raise TypeError(
            f"history[{number}] has to be optimizer.metrics or its as_dict(), got "
            f"{type(entry).__name__}"
        )
    return row


def _draw(axis: Axes, rows: Sequence[Mapping[str, float]], series: Mapping[str, str]) -> None:
    """Lines of finite numbers."""
    drawn: list[float] = []
    for name, label in series.items():
        points = [(row["gradient_evaluations"], row[name]) for row in rows]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        marker = "." if len(points) < 20 else ""  # one point has no line
        axis.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=label)
        drawn += [y for _, y in points]
    positive = [y for y in drawn if y > 0]
    if positive and min(drawn) >= 0 and max(positive) >= _DECADE * min(positive):
        axis.set_yscale("log")
    axis.legend()


def _entries(axis: Axes, report: HypergradientReport) -> None:
    estimate, exact = (
        torch.cat([t.detach().double().flatten().cpu() for t in tensors])
        for tensors in (report.estimate, report.exact)
    )
    every = math.ceil(len(exact) / _MOST_POINTS)
    axis.plot(exact[::every].tolist(), estimate[::every].tolist(), ".", label="entries of u")
    both = torch.cat([exact, estimate])  # of a single entry the exact one alone is no line
    ends = [float(both.min()), float(both.max())]
    axis.plot(ends, ends, color="grey", linestyle=":", label="equal")
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("exact, by implicit differentiation")
    axis.set_ylabel("estimate")
    error, cosine = f"{report.relative_error:.2g}", f"{report.cosine:.4f}"
    axis.set_title(f"relative error {error}, cosine {cosine}", loc="left", fontsize="medium")
    axis.legend()


def _slopes(axis: Axes, report: HypergradientReport) -> None:
    places = range(len(report.slopes))
    for shift, (name, label) in enumerate(
        [("estimate", "estimate"), ("exact", "exact"), ("resolved", "v re-solved")]
    ):
        x = [place + 0.15 * (shift - 1) for place in places]
        y = [getattr(slope, name) for slope in report.slopes]
        if name == "resolved":
            spread = [slope.uncertainty for slope in report.slopes]
            axis.errorbar(x, y, yerr=spread, fmt="o", capsize=4, label=label)
        else:
            axis.plot(x, y, "o", label=label)
    axis.axhline(0.0, color="grey", linewidth=0.5)
    axis.set_xticks([*places], [slope.direction for slope in report.slopes])
    axis.set_xlim(-0.5, len(report.slopes) - 0.5)
    axis.set_ylabel("slope of f(u, v*(u))")
    axis.set_title("along one direction of u", loc="left", fontsize="medium")
    axis.legend()
