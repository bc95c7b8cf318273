r"""An equilibrium model of MNIST: the layer's output is the fixed point of its own map.

    python -m examples.equilibrium_mnist --method all   # table, agreement and picture
    python -m examples.equilibrium_mnist --tune         # choose the knobs on the grid

Each image x has a state z of 200 numbers that solves z = tanh(W z + U x + b); a linear read-out
of z gives the classes. The states of the 5,000 training images are the lower variables, the fixed
point of the map their lower level; W, U, b and the read-out are the upper variables and f is the
cross entropy of the training images. After every upper step W goes back to the ball of matrices
with spectral norm 0.99 at most, so that the map is a contraction. 5,000 other images are the test
set.

Three ways to the same hypergradient, all warm-started:

- penalty: ``FixedPoint``, one evaluation of the map and one product in each step;
- fixed_point: T maps, then K = T products of the adjoint fixed-point iteration;
- cg_normal: T maps, then conjugate gradients on the normal equations with 2 K products.

Besides them two models without an equilibrium: softmax regression, and the same network with
W = 0, trained by the same rule for as many steps as the penalty. Knobs (Adam's upper rate and T)
are chosen on seed 100 with 1,000 images and 600 evaluations (``--tune --train 1000 --test 1000
--evaluations 600``) by the training loss at the solved equilibrium, never on the seeds
reported. All have the same budget of gradients, maps and products. Losses and accuracies are
those of the solved equilibrium; the clock, of this process's CPU time, stands still meanwhile.

First the three are compared at one point, in float64: cosine and relative error to implicit
differentiation solved to 1e-12.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.data.mirrors import default_folder
from examples.data.mnist import mnist
from examples.equilibrium_mnist.problem import (
    Parameters,
    Problem,
    layer,
    loss_of,
    make_parameters,
    make_problem,
    project,
)
from examples.equilibrium_mnist.report import draw, table
from examples.equilibrium_mnist.rows import METHODS, agreement, baselines, seen
from examples.shared import command
from examples.shared.grid import print_best, settings
from examples.shared.record import Line, Record
from torch_penalty_bilevel import FixedPoint, HypergradientOptimizer, PenaltyBilevelOptimizer

GRID = {"upper_lr": (3e-4, 1e-3, 3e-3), "lower_steps": (1, 5)}
TUNED = {"penalty": (3e-3, 5), "fixed_point": (3e-3, 5), "cg_normal": (3e-3, 5)}
TUNING_SEED = 100
RECORD = Path("results/equilibrium_mnist.jsonl")  # delete it when the code has changed
PICTURE = Path("results/equilibrium_mnist.png")
Images = tuple[Tensor, Tensor]
Optimizer = PenaltyBilevelOptimizer | HypergradientOptimizer


def make_optimizer(p: Parameters, z: Tensor, method: str, upper_lr: float, steps: int) -> Optimizer:
    """Any method on the same closures; v <- v - (v - map(v)) is one iteration of the map."""
    upper, lower = list(p.values()), torch.optim.SGD([z], lr=1.0)
    if method == "penalty":
        return PenaltyBilevelOptimizer(
            upper, lower, upper_lr=upper_lr, lower_steps=steps, penalty=FixedPoint()
        )
    return HypergradientOptimizer(
        upper,
        lower,
        method=method,
        upper_lr=upper_lr,
        lower_steps=steps,
        inner_iterations=steps if method == "fixed_point" else 2 * steps,
        lower_is_map=True,
    )


def train(
    problem: Problem,
    setting: Line,
    seed: int,
    width: int,
    budget: int,
    moments: int,
    tick: Callable[[int], object],
) -> Line:
    """One method until ``budget`` evaluations, seen at ``moments`` of them."""
    dtype = problem.images.dtype
    p = make_parameters(seed, width, dtype)
    z = torch.zeros(len(problem.labels), width, dtype=dtype, requires_grad=True)
    optimizer = make_optimizer(p, z, setting["method"], setting["upper_lr"], setting["lower_steps"])
    marks = np.unique(np.geomspace(10, budget, moments).astype(int)).tolist()
    seconds, count, steps, path = 0.0, 0, 0, []
    while count < budget:
        began = time.process_time()
        optimizer.step(lambda: loss_of(p, z, problem.labels), lambda: layer(p, z, problem.images))
        project(p["W"])
        seconds, steps = seconds + time.process_time() - began, steps + 1
        tick(optimizer.metrics.gradient_evaluations - count)
        count = optimizer.metrics.gradient_evaluations
        if count >= marks[0] or count >= budget:
            path.append({"seconds": seconds, "evaluations": count, **seen(p, problem)})
            marks = [mark for mark in marks if mark > count] or [budget]
    return {**path[-1], "steps": steps, "path": path}


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it."""
    first, count = (TUNING_SEED, 1) if options.tune else (options.first_seed, options.seeds)
    common = common_of(options)
    return [
        {**common, "seed": seed, **setting}
        for seed in range(first, first + count)
        for method in methods_of(options)
        for setting in settings(method, GRID, TUNED[method], options)
    ]


def common_of(options: argparse.Namespace) -> Line:
    """What every run of the command has in common."""
    sizes = {name: getattr(options, name) for name in ("train", "test", "width")}
    moments = 1 if options.tune else options.moments
    return {**sizes, "budget": options.evaluations, "moments": moments}


def methods_of(options: argparse.Namespace) -> tuple[str, ...]:
    """One method or all of them."""
    return METHODS if options.method == "all" else (options.method,)


def perform(todo: list[Line], record: Record, data: Images) -> None:
    """Run what is to be done, in order."""
    with tqdm(total=sum(run["budget"] for run in todo), file=sys.stderr, mininterval=1) as bar:
        for run in todo:
            problem = make_problem(data, run["seed"], run["train"], run["test"])
            bar.set_description(run["method"])
            arguments = run["seed"], run["width"], run["budget"], run["moments"]
            record.add(run, train(problem, run, *arguments, bar.update))


def simple_rows(
    runs: list[Line], record: Record, data: Images, options: argparse.Namespace
) -> dict[str, list[Line]]:
    """The models without an equilibrium, each beside the first method's run of its seed."""
    rows: dict[str, list[Line]] = {}
    for run in (run for run in runs if run["method"] == methods_of(options)[0]):
        rate, steps, seed = run["upper_lr"], record[run]["steps"], run["seed"]
        simple = {"row": "baselines", **common_of(options)}
        simple |= {"seed": seed, "rate": rate, "steps": steps}
        if simple not in record:
            problem = make_problem(data, seed, options.train, options.test)
            record.add(simple, baselines(problem, seed, options.width, rate, steps))
        for name, row in record[simple].items():
            rows.setdefault(name, []).append(row)
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, f"{__doc__}\nThe grid: {GRID}.")
    add = parser.add_argument
    add("--method", choices=("all", *METHODS), default="all", help="(all)")
    add("--tune", action="store_true", help="try the grid on the tuning seed, print the best")
    add("--upper-lr", type=float, help="Adam's rate for u (tuned)")
    add("--lower-steps", type=int, help="T (tuned)")
    add("--evaluations", type=int, default=400, help="gradients, maps, products per run (400)")
    add("--train", type=int, default=5000, help="training images (5000)")
    add("--test", type=int, default=5000, help="test images (5000)")
    add("--width", type=int, default=200, help="length of z (200)")
    add("--seeds", type=int, default=2, help="number of seeds (2)")
    add("--first-seed", type=int, default=0, help="first of them (0)")
    add("--moments", type=int, default=8, help="points of a path (8)")
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--folder", type=Path, default=default_folder("mnist"), help="folder of MNIST")
    add("--record", type=Path, default=RECORD, help=f"finished runs ({RECORD})")
    add("--output", type=Path, default=PICTURE, help=f"picture ({PICTURE})")
    return parser.parse_args()


def main() -> None:
    """Run what is not in the record yet; print and draw what is."""
    options = parse()
    torch.set_num_threads(options.threads)
    data, record = mnist(options.folder), Record(options.record)
    runs, methods = planned(options), methods_of(options)
    perform([run for run in runs if run not in record], record, data)
    if options.tune:
        print_best(methods, runs, record, GRID, by="loss")
        return
    results = {m: [record[run] for run in runs if run["method"] == m] for m in methods}
    results |= simple_rows(runs, record, data, options)
    print(agreement(data, options.width), end="\n\n")
    print(table(results))
    draw(results, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
