"""How robust cleaning MNIST's labels is to the learning rates: nine settings, one default.

    python -m benchmarks.cleaning --seeds 3          # the tables of benchmarks/README.md
    python -m benchmarks.cleaning --problems digits  # the same factors on the digits demo

5,000 training images, half of whose labels are drawn anew from all ten classes, and 1,000 clean
validation images; the rest of the 70,000 are for tests. The upper variables u are one logit per
training image, the lower variables v a linear model (784-10) or an MLP (784-300-10, ReLU):

    f = cross entropy on 200 validation images
    g = mean over 200 training images of sigmoid(u_i) * cross entropy_i

Adam's learning rates are 1e-3 (lower) and 1e-1 (upper) times every pair of 1/3, 1 and 3; all else
is the optimizer's default unless an option says otherwise. The seed draws the split, the noise,
the first v and the batches. The digits demo keeps its own rates, steps and rule.

Columns: test accuracy of the running model after some and after all steps; of a fresh model
trained on the images with weight > 1/2 and the validation images; the share of training labels
told right; the mean of that share over right and over wrong labels; the area under the ROC curve.
The baselines learn no weights; their models and the fresh one share a recipe. Every finished run
is a line of the output file and is skipped when found there.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.shared.mnist_rows import (
    BATCH,
    Problem,
    accuracy,
    baselines,
    fit,
    make_model,
    make_problem,
    score,
)
from examples import denoise_digits
from examples.data.mirrors import default_folder
from examples.data.mnist import mnist
from examples.shared import command, digits_rows
from examples.shared.record import Line, Record
from torch_penalty_bilevel import (
    LeastSquares,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    Stationarity,
)

OUTPUT = Path("results/cleaning.jsonl")  # delete it when the code has changed
FACTORS = (1 / 3, 1.0, 3.0)
LOWER_LR, UPPER_LR = 1e-3, 1e-1
COLUMNS = ("running", "retrained", "told_right", "balanced", "auc")


def clean(problem: Problem, setting: Line) -> Line:
    """Learn the weights under one setting; what the model and the weights are worth."""
    model = make_model(setting["problem"], problem.seed)
    logits = torch.zeros(len(problem.labels), requires_grad=True)
    rule = LeastSquares(setting["damping"], setting["share"], setting["ridge"])
    optimizer = PenaltyBilevelOptimizer(
        [logits],
        list(model.parameters()),
        upper_lr=UPPER_LR * setting["upper"],
        lower_lr=LOWER_LR * setting["lower"],
        warmup_steps=setting["warmup_steps"],
        penalty=Stationarity(rule),
    )
    generator = torch.Generator().manual_seed(problem.seed)

    def draw(total: int) -> Tensor:
        return torch.randperm(total, generator=generator)[:BATCH]

    def upper() -> Tensor:
        return cross_entropy(model(problem.clean_images[there]), problem.clean_labels[there])

    def lower() -> Tensor:
        outputs = model(problem.images[here])
        losses = cross_entropy(outputs, problem.labels[here], reduction="none")
        return (logits[here].sigmoid() * losses).mean()

    path, marks = [], {setting["steps"] // 4, setting["steps"] // 2, setting["steps"]}
    began = time.perf_counter()
    for step in range(1, setting["steps"] + 1):
        for half_step in range(setting["lower_steps"]):
            here, there = draw(len(problem.labels)), draw(len(problem.clean_labels))
            last = half_step == setting["lower_steps"] - 1
            try:
                if not last:
                    optimizer.lower_step(upper, lower)
                elif setting["lower_steps"] == 1:
                    optimizer.step(upper, lower)
                else:
                    optimizer.lower_step(upper, lower)
                    optimizer.upper_step(upper, lower)
            except NonFiniteError as error:
                return {"diverged": f"{error}", "path": path}
        if step in marks:
            path.append(_seen(step, problem, model, logits.detach(), optimizer))
    seconds = time.perf_counter() - began
    fresh = fit(setting["problem"], problem, logits.detach() > 0, "learned")
    retrained = accuracy(fresh, problem.test_images, problem.test_labels)
    return {**path[-1], "retrained": retrained, "seconds": seconds, "path": path}


@torch.no_grad()
def _seen(
    step: int,
    problem: Problem,
    model: torch.nn.Module,
    logits: Tensor,
    optimizer: PenaltyBilevelOptimizer,
) -> Line:
    validation = cross_entropy(model(problem.clean_images), problem.clean_labels)
    return {
        "step": step,
        "running": accuracy(model, problem.test_images, problem.test_labels),
        "validation_loss": validation.item(),
        "adjoint_norm": torch.stack([q.norm() for q in optimizer.adjoint]).norm().item(),
        "adjoint_residual_norm": float(optimizer.metrics.adjoint_residual_norm),
        **score(logits.sigmoid(), problem),
    }


def digits(setting: Line) -> Line:
    """A setting, or all baselines, of the digits demo."""
    problem = digits_rows.make_problem(setting["seed"], noise=0.5, clean=30)
    names = ("retrained", "told_right", "auc", "seconds")

    def measured(row: Callable[[Any], Any]) -> Line:
        return dict(zip(names, denoise_digits.measure(row, problem), strict=True))

    if "row" in setting:
        return {
            "validation only": measured(digits_rows.validation_only),
            "noisy + validation": measured(digits_rows.noisy_and_validation),
            "agreement filter": measured(digits_rows.agreement_filter),
            "oracle": measured(digits_rows.oracle),
        }
    rates = {"upper_lr": 0.05 * setting["upper"], "lower_lr": 1e-2 * setting["lower"]}
    learned = measured(lambda p: denoise_digits.penalty(p, denoise_digits.STEPS, **rates))
    return {**learned, "path": []}


def _cell(values: list[float]) -> str:
    """Median, and the range where there is one."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def print_tables(record: Record, runs: list[Line]) -> None:
    """Per model the baselines, the settings, and which of them end below the agreement filter."""
    for kind in dict.fromkeys(run["problem"] for run in runs):
        mine = [run for run in runs if run["problem"] == kind]
        groups: dict[str, list[Line]] = {}
        for run in mine:
            result = record[run]
            if "row" in run:
                for name, values in result.items():
                    groups.setdefault(name, []).append(values)
            else:
                name = f"lower x {run['lower']:.2g}, upper x {run['upper']:.2g}"
                groups.setdefault(name, []).append(result)
        header = ["row", "at 1/4, 1/2", *COLUMNS, "below filter, seeds"]
        print(f"\n{kind}\n\n| " + " | ".join(header) + " |")
        print("|---" * len(header) + "|")
        bar = [values["retrained"] for values in groups["agreement filter"]]
        for name, results in groups.items():
            print("| " + " | ".join([name, *_columns(results), _verdict(results, bar)]) + " |")


def _columns(results: list[Line]) -> list[str]:
    """Over the runs that did not diverge; ``_verdict`` counts those that did."""
    ended = [result for result in results if "diverged" not in result]
    paths = [[seen["running"] for seen in r["path"][:-1]] for r in ended if "path" in r]
    early = ", ".join(f"{statistics.median(column):.3f}" for column in zip(*paths, strict=True))
    return [early, *(_cell([r[c] for r in ended if c in r]) for c in COLUMNS)]


def _verdict(results: list[Line], bar: list[float]) -> str:
    """In how many seeds a setting diverged, or ended below the agreement filter of that seed."""
    if not any("path" in result for result in results):
        return ""  # a baseline
    counts = {"diverged": sum("diverged" in result for result in results)}
    for name in ("running", "retrained"):
        pairs = zip(results, bar, strict=True)
        counts[name] = sum(name in result and result[name] < b for result, b in pairs)
    return ", ".join(f"{name} {count}/{len(bar)}" for name, count in counts.items() if count)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument(
        "--problems",
        nargs="+",
        choices=("linear", "mlp", "digits"),
        default=("linear", "mlp"),
        help="the two models on MNIST, or examples/denoise_digits.py as it is (linear mlp)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (1)")
    parser.add_argument("--steps", type=int, default=800, help="upper steps (800)")
    parser.add_argument(
        "--data", type=Path, default=default_folder("mnist"), help="folder of MNIST"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"finished runs ({OUTPUT})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    rule = LeastSquares()
    for name in ("damping", "share", "ridge"):
        parser.add_argument(f"--{name}", type=float, default=getattr(rule, name))
    parser.add_argument(
        "--factors", type=float, nargs="+", default=FACTORS, help="of both rates (1/3 1 3)"
    )
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--lower-steps", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    names = ("steps", "damping", "share", "ridge", "warmup_steps", "lower_steps")
    common = {name: getattr(options, name) for name in names}
    runs: list[Line] = []
    for kind, seed in itertools.product(options.problems, range(options.seeds)):
        runs.append({"row": "baselines", "problem": kind, "seed": seed})
        for lower, upper in itertools.product(options.factors, repeat=2):
            rates = {"lower": lower, "upper": upper}
            own = {} if kind == "digits" else common
            runs.append({"problem": kind, "seed": seed, **rates, **own})
    record, data = Record(options.output), None
    for run in tqdm(runs, file=sys.stderr):
        if run in record:
            continue
        if run["problem"] == "digits":
            record.add(run, digits(run))
            continue
        data = data or mnist(options.data)
        problem = make_problem(data, run["seed"])
        found = baselines(run["problem"], problem) if "row" in run else clean(problem, run)
        record.add(run, found)
    print_tables(record, runs)


if __name__ == "__main__":
    main()
