"""Cost to a relative error of 1e-6 against the condition number of the lower level.

    python -m benchmarks.condition               # benchmarks/condition.png and its table
    python -m benchmarks.condition --kappas 10 100 --seeds 1

Problem ``quadratic`` of ``torch_penalty_bilevel.testing``: A has the eigenvalues 1 to kappa. Each
seed has its own data and start. Counted are the evaluations of ``minimize`` (default settings)
and the lower steps of ``PenaltyBilevelOptimizer`` (default penalty, 5 lower steps per upper step),
without the multiplier's correction, with it (the default), and with ``correct_lower=True``, which
moves v, too:

- SGD: the rates 1/kappa below and 0.03 above, until the error is reached. F(u) = f(u, v*(u)) curves
  by up to 14 to 30, whatever kappa is: 0.1 would be too long for exact hypergradients, too;
- Adam: 0.1 on both levels with cosine decay; the horizon is doubled from 320 lower steps on until
  a whole run ends with the error reached, so the count is exact up to a factor of two.

The slope is that of the logarithm of the cost over that of kappa, from the first kappa to the last.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Callable
from functools import partial

import matplotlib

from examples.shared import command

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from torch_penalty_bilevel import (
    LeastSquares,
    MinimizeResult,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
    minimize,
    testing,
)

ACCURACY = 1e-6
LOWER_STEPS = 5
Rule = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
Cost = Callable[[testing.Problem, int, int], float]


def start(problem: testing.Problem, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, v = problem.start(torch.Generator().manual_seed(seed))
    return u, v


def evaluations(problem: testing.Problem, seed: int, limit: int) -> float:
    """Of ``minimize``, at the first iterate within the accuracy."""

    def reached(result: MinimizeResult) -> bool:
        return float(problem.error(result.upper, result.lower)) <= ACCURACY

    assert problem.lower_loss is not None
    result = minimize(
        problem.upper_loss,
        problem.lower_loss,
        *start(problem, seed),
        max_evaluations=limit,
        callback=reached,
    )
    return result.evaluations if reached(result) else float("nan")


def run(
    problem: testing.Problem,
    seed: int,
    rules: tuple[Rule, Rule],
    outer: int,
    form: LeastSquares,
    *,
    decay: bool,
) -> float:
    """Lower steps to the accuracy, at the end of the run or (without decay) as soon as possible."""
    u, v = (x.requires_grad_() for x in start(problem, seed))
    optimizer = PenaltyBilevelOptimizer(
        rules[0]([u]), rules[1]([v]), lower_steps=LOWER_STEPS, penalty=Stationarity(form)
    )
    scheduler = CosineAnnealingLR(optimizer, outer) if decay else None
    g = problem.lower_loss
    assert g is not None
    for done in range(1, outer + 1):
        try:
            optimizer.step(lambda: problem.upper_loss(u, v), lambda: g(u, v))
        except NonFiniteError:
            break
        if scheduler is not None:
            scheduler.step()
        if (
            scheduler is None
            and done % 10 == 0
            and float(problem.error(u.detach(), v.detach())) <= ACCURACY
        ):
            return done * LOWER_STEPS
    return (
        outer * LOWER_STEPS
        if float(problem.error(u.detach(), v.detach())) <= ACCURACY
        else float("nan")
    )


def sgd(form: LeastSquares, problem: testing.Problem, seed: int, limit: int) -> float:
    kappa = problem.kappa
    assert kappa is not None
    rules = (lambda t: torch.optim.SGD(t, lr=0.03), lambda t: torch.optim.SGD(t, lr=1 / kappa))
    return run(problem, seed, rules, limit // LOWER_STEPS, form, decay=False)


def adam(form: LeastSquares, problem: testing.Problem, seed: int, limit: int) -> float:
    rule = lambda t: torch.optim.Adam(t, lr=0.1)  # noqa: E731
    horizon = 320
    while horizon <= limit:
        found = run(problem, seed, (rule, rule), horizon // LOWER_STEPS, form, decay=True)
        if found == found:
            return found
        horizon *= 2
    return float("nan")


FORMS = {
    "no correction": LeastSquares(subspace=False),
    "default": LeastSquares(),
    "v corrected": LeastSquares(correct_lower=True),
}
COLOURS = dict(zip(FORMS, ("C1", "C0", "C2"), strict=True))
COSTS: dict[str, Cost] = {
    "minimize, evaluations": evaluations,
    **{f"SGD, {name}, lower steps": partial(sgd, form) for name, form in FORMS.items()},
    **{f"Adam, {name}, lower steps": partial(adam, form) for name, form in FORMS.items()},
}

ROWS = tuple(dict.fromkeys(label.split(",")[0] for label in COSTS))


def slope(kappas: list[float], values: list[float]) -> str:
    """Of log cost over log kappa, first to last; empty where either is missing."""
    if len(kappas) == 1 or values[0] != values[0] or values[-1] != values[-1]:
        return ""
    return f"{math.log(values[-1] / values[0]) / math.log(kappas[-1] / kappas[0]):.2f}"


def draw(kappas: list[float], rows: dict[str, list[float]], path: pathlib.Path) -> None:
    """The medians against kappa, with both slopes through the first of them."""
    figure, axes = plt.subplots(figsize=(7.0, 5.6), constrained_layout=True)
    for label, values in rows.items():
        rule, form, *_ = (*label.split(", "), "")
        style = {"SGD": "s-", "Adam": "D--"}.get(rule, "o-")
        axes.loglog(kappas, values, style, color=COLOURS.get(form, "black"), label=label)
    anchor = max(values[0] for values in rows.values())
    for power, style, label in ((0.5, ":", "slope 1/2"), (1.0, "--", "slope 1")):
        line = [anchor * (kappa / kappas[0]) ** power for kappa in kappas]
        axes.loglog(kappas, line, style, color="0.6", label=label)
    axes.set_xlabel("condition number of the lower Hessian")
    axes.set_ylabel(f"cost to a relative error of {ACCURACY:.0e}")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--kappas", type=float, nargs="+", default=[1e1, 1e2, 1e3, 1e4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        help="Adam takes the longest (all)",
    )
    parser.add_argument("--limit", type=int, default=40_000, help="evaluations or lower steps")
    parser.add_argument(
        "--picture", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png")
    )
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    costs = {label: cost for label, cost in COSTS.items() if label.split(",")[0] in options.rows}
    rows: dict[str, list[float]] = {label: [] for label in costs}
    print(
        "| cost, median (range) | " + " | ".join(f"{k:.0e}" for k in options.kappas) + " | slope |"
    )
    print("|---|" + "---|" * (len(options.kappas) + 1))
    for label, cost in costs.items():
        cells = list[str]()
        for kappa in tqdm(options.kappas, desc=label):
            problems = [testing.get("quadratic", kappa=kappa, seed=s) for s in range(options.seeds)]
            found = [cost(p, 100 + s, options.limit) for s, p in enumerate(problems)]
            reached = [x for x in found if x == x]
            complete = len(reached) == len(found)  # a median of the successful would flatter
            rows[label].append(statistics.median(reached) if complete else float("nan"))
            cells.append(
                f"{rows[label][-1]:.0f} ({min(found):.0f}-{max(found):.0f})"
                if complete
                else f"{len(reached)} of {len(found)} within {options.limit}"
            )
        cells.append(slope(options.kappas, rows[label]))
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    draw(options.kappas, rows, options.picture)
    print(f"\n{options.seeds} seeds each; {command.machine()}")


if __name__ == "__main__":
    main()
