"""python -m torch_penalty_bilevel: the first example of the README, with what it is worth.

Half of some labels are wrong; which? u is one weight per sample, v a linear model trained on the
weighted samples, f its loss on a hundred trusted ones. On scikit-learn's handwritten digits where
that is installed, else on clouds of points that torch draws.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import Metrics, PenaltyBilevelOptimizer

TRUSTED, CLASSES = 100, 10


class Data(NamedTuple):
    """Samples, the last ``TRUSTED`` of them with labels that can be trusted."""

    what: str
    x: Tensor
    """Shape (n, 64)."""
    given: Tensor
    """Labels, shape (n,): half of them wrong, but for the trusted."""
    wrong: Tensor
    """Which; shape (n - TRUSTED,)."""


class Run(NamedTuple):
    """What the optimizer learned."""

    u: Tensor
    history: list[Metrics]
    report: str
    """``repr`` of the optimizer at the end, without its groups."""
    seconds: float


def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8 by 8 pixels in [0, 1], and what they show."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    return x.float() / 16, y


def clouds() -> tuple[Tensor, Tensor]:
    """As many points around ten centres in 64 dimensions, and their centres' numbers."""
    y = torch.arange(1797) % CLASSES
    return torch.randn(CLASSES, 64)[y] / 2 + torch.randn(1797, 64), y


def mislabelled() -> Data:
    """Half of the labels made wrong."""
    if importlib.util.find_spec("sklearn") is not None:
        what, (x, y) = "handwritten digits (scikit-learn)", digits()
    else:
        what, (x, y) = "points in ten clouds (with scikit-learn: handwritten digits)", clouds()
    wrong = torch.rand(len(y)) < 0.5
    wrong[-TRUSTED:] = False
    given = torch.where(wrong, (y + torch.randint(1, CLASSES, y.shape)) % CLASSES, y)
    return Data(what, x, given, wrong[:-TRUSTED])


def learned(data: Data, steps: int) -> Run:
    """The example: u by its effect on the loss of the trusted samples."""
    (x, trusted), (y, known) = (t.split([len(data.wrong), TRUSTED]) for t in (data.x, data.given))
    model = torch.nn.Linear(64, CLASSES)  # v: any unmodified nn.Module
    u = torch.zeros(len(y), requires_grad=True)  # u: one weight per sample
    optimizer = PenaltyBilevelOptimizer([u], model.parameters(), upper_lr=0.1, lower_lr=0.1)
    history: list[Metrics] = []
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step(
            lambda: cross_entropy(model(trusted), known),  # f
            lambda: (u.sigmoid() * cross_entropy(model(x), y, reduction="none")).mean(),  # g
        )
        history.append(optimizer.metrics)
    seconds = time.perf_counter() - start
    return Run(u.detach(), history, repr(optimizer).split("\nParameter Group")[0], seconds)


def agreeing(x: Tensor, y: Tensor, data: Data, steps: int) -> Tensor:
    """Which given labels a plain model of ``x``, ``y`` agrees with."""
    model = torch.nn.Linear(64, CLASSES)
    rule = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        rule.zero_grad()
        cross_entropy(model(x), y).backward()
        rule.step()
    untrusted = len(data.wrong)
    return model(data.x[:untrusted]).argmax(1) == data.given[:untrusted]


def report(data: Data, run: Run, steps: int) -> str:
    """What was done and what it is worth, for a person."""
    n, certificate = len(data.wrong), run.history[-1].relative_certificate
    kept = {
        "this optimizer keeps": run.u > 0,
        "keep all": torch.ones(n, dtype=torch.bool),
        "keep what a model of the trusted samples agrees with": agreeing(
            data.x[n:], data.given[n:], data, steps
        ),
        "keep what a model of all given labels agrees with": agreeing(
            data.x, data.given, data, steps
        ),
    }
    told = {name: float((keep != data.wrong).float().mean()) for name, keep in kept.items()}
    lines = [
        f"{n:,} {data.what}; {float(data.wrong.float().mean()):.0%} of their labels are wrong, "
        f"{TRUSTED} more can be trusted.",
        "u: one weight per sample; v: a linear model; f: the loss of the trusted, g: of the rest.",
        "",
        run.report + "\n)",
        f"{steps} steps in {run.seconds:.2f} s. The certificate ||grad_v f + H q|| is "
        f"{float(certificate):.2f} of ||grad_v f||",
        "(0: the hypergradient is exact, 1: no better than without a multiplier).",
        "",
        "Labels told right from wrong:",
        *(f"  {share:4.0%}  {name}" for name, share in told.items()),
        "Filters by agreement do well where wrong labels are random, as here, and fail where they",
        "are systematic: examples/RESULTS.md of the source has both.",
    ]
    return "\n".join(lines)


NEXT = f"""
Where to go next:
  {__file__}
      is this example: start from its function `learned`
  print(optimizer.check_hypergradient(f, g))
      compares the hypergradient with exact ones and names likely causes where it is off
  python -m torch_penalty_bilevel --plot run.png
      the certificate along the run (matplotlib)
  python -c "import torch_penalty_bilevel as t; help(t.PenaltyBilevelOptimizer)"
      every argument; README.md and docs/ of the source have the rest, examples/ larger problems"""


def no_picture(file: str) -> str:
    """Why nothing can be drawn into ``file``; empty where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return 'matplotlib is not installed; pip install "torch_penalty_bilevel[plot]"'
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(file).absolute()
    known = sorted(FigureCanvasBase.filetypes)
    if path.suffix[1:].lower() not in known:
        return f"its name has to end with the kind of picture, one of {', '.join(known)}"
    return "" if path.parent.is_dir() else f"{path.parent} is no folder"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_penalty_bilevel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of labels and weights (default: 0)")
    parser.add_argument("--steps", type=int, default=100, help="at least 1 (default: 100)")
    parser.add_argument("--plot", metavar="FILE", help="draw the run into FILE, with matplotlib")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must lie in [0, 2^63), got {options.seed}")
    if options.plot and (why := no_picture(options.plot)):
        parser.error(f"--plot {options.plot}: {why}")
    torch.manual_seed(options.seed)
    data = mislabelled()
    run = learned(data, options.steps)
    print(report(data, run, options.steps))
    if options.plot:
        from torch_penalty_bilevel.plotting import plot_metrics

        plot_metrics(run.history).savefig(options.plot)
        print(f"\nThe run is drawn in {options.plot}.")
    print(NEXT)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # "| head -1" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
