"""What is drawn is what was seen, read back from the figures."""

import math
import sys

import pytest
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.plotting import plot_metrics, plot_report

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_screen():
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    yield
    plt.close("all")


def problem(size=3):
    u = torch.zeros(size, requires_grad=True)
    v = torch.zeros(size, requires_grad=True)
    scale = torch.linspace(1.0, 2.0, size)
    f = lambda: (v - 1).square().sum()  # noqa: E731
    g = lambda: (scale * (v - u.sin() - 0.5).square()).sum() / 2  # noqa: E731
    return PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=0.1), f, g


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_every_panel_has_the_numbers_of_the_run():
    optimizer, *losses = problem()
    history = []
    for _ in range(30):
        optimizer.step(*losses)
        history.append(optimizer.metrics)
    losses_, residuals, relative, hypergradient = plot_metrics(history).axes
    drawn = {
        "upper_loss": lines(losses_)["f(u, v)"],
        "lower_loss": lines(losses_)["g(u, v)"],
        "adjoint_residual_norm": lines(residuals)[r"certificate $\|\nabla_v f + Hq\|$"],
        "residual_norm": lines(residuals)[r"$\|\nabla_v g\|$"],
        "relative_certificate": relative.get_lines()[0],
        "upper_grad_norm": lines(hypergradient)[r"$\|\nabla_u f + Jq\|$"],
    }
    for name, line in drawn.items():
        assert list(line.get_ydata()) == [float(getattr(m, name)) for m in history], name
        assert list(line.get_xdata()) == [m.gradient_evaluations for m in history], name
    assert list(lines(relative)["q = 0"].get_ydata()) == [1.0, 1.0]
    assert relative.get_xlabel() == hypergradient.get_xlabel() == "gradient evaluations"


def rows(**series):
    names = "upper_loss lower_loss adjoint_residual_norm residual_norm relative_certificate"
    count = len(next(iter(series.values())))
    whole = dict.fromkeys([*names.split(), "upper_grad_norm"], [1.0] * count) | series
    whole["gradient_evaluations"] = [3 * k for k in range(count)]
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def test_what_is_not_finite_is_left_out():
    history = rows(upper_grad_norm=[1.0, math.nan, 2.0, math.inf])
    line = plot_metrics(iter(history)).axes[3].get_lines()[0]
    assert list(line.get_xdata()) == [0, 6]
    assert list(line.get_ydata()) == [1.0, 2.0]
    assert line.get_marker() == "."  # a single point has no line


@pytest.mark.parametrize(
    ("numbers", "scale"),
    [
        ([1.0, 9.0], "linear"),
        ([1.0, 10.0], "log"),
        ([0.0, 1.0, 10.0], "log"),
        ([-1.0, 1.0, 10.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([math.nan, math.nan], "linear"),
    ],
)
def test_axes_are_logarithmic_where_that_shows_more(numbers, scale):
    assert plot_metrics(rows(upper_grad_norm=numbers)).axes[3].get_yscale() == scale


def test_nothing_to_draw_and_what_is_no_metrics():
    with pytest.raises(ValueError, match=r"history is empty.*append optimizer\.metrics"):
        plot_metrics([])
    with pytest.raises(TypeError, match=r"history\[1\] has to be optimizer\.metrics.*got dict"):
        plot_metrics([*rows(upper_loss=[1.0]), {"upper_loss": 1.0}])
    with pytest.raises(TypeError, match="got float"):
        plot_metrics([0.5])


def test_a_report_is_drawn_entry_by_entry():
    optimizer, f, g = problem()
    for _ in range(3):
        optimizer.step(f, g)
    report = optimizer.check_hypergradient(f, g)
    entries, slopes = plot_report(report).axes
    line = entries.get_lines()[0]
    assert line.get_xdata() == pytest.approx(report.exact[0].tolist())
    assert line.get_ydata() == pytest.approx(report.estimate[0].tolist())
    drawn = lines(slopes)
    assert list(drawn["estimate"].get_ydata()) == [s.estimate for s in report.slopes]
    assert list(drawn["exact"].get_ydata()) == [s.exact for s in report.slopes]
    bars = slopes.containers[0]
    assert list(bars.lines[0].get_ydata()) == [s.resolved for s in report.slopes]
    ends = [y for segment in bars.lines[2][0].get_segments() for y in segment[:, 1]]
    assert ends == pytest.approx(
        [y for s in report.slopes for y in (s.resolved - s.uncertainty, s.resolved + s.uncertainty)]
    )
    ticks = [label.get_text() for label in slopes.get_xticklabels()]
    assert ticks == [s.direction for s in report.slopes]
    title = entries.figure.get_suptitle()
    assert title.split("\n")[0] in str(report).split("\n")[0]
    assert title.split("\n")[1] == "findings: " + ", ".join(x.name for x in report.findings)


def test_of_a_large_u_every_nth_entry_and_no_slopes_where_none_were_solved():
    optimizer, f, g = problem(4100)
    optimizer.step(f, g)
    report = optimizer.check_hypergradient(f, g, resolve=False)
    (entries,) = plot_report(report).axes
    assert entries.get_lines()[0].get_xdata() == pytest.approx(report.exact[0][::3].tolist())


def test_of_one_entry_the_diagonal_is_a_line_too():
    """It is what the entry is to be seen beside."""
    optimizer, f, g = problem(size=1)
    optimizer.step(f, g)
    report = optimizer.check_hypergradient(f, g)
    exact, estimate = float(report.exact[0]), float(report.estimate[0])
    assert abs(exact - estimate) > 1e-3
    equal = lines(plot_report(report).axes[0])["equal"]
    assert list(equal.get_xdata()) == list(equal.get_ydata()) == sorted([exact, estimate])


def test_what_is_no_history_and_no_report_is_named():
    optimizer, f, g = problem()
    optimizer.step(f, g)
    for one in (optimizer.metrics, optimizer.metrics.as_dict()):
        with pytest.raises(TypeError, match=r"history is .*, the numbers of one step; keep"):
            plot_metrics(one)
    with pytest.raises(TypeError, match=r"report is Metrics; give what optimizer.check_hyper"):
        plot_report(optimizer.metrics)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot_metrics.*torch_penalty_bilevel\[plot\]"):
        plot_metrics(rows(upper_loss=[1.0]))
