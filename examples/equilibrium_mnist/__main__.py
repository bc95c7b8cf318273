r"""An equilibrium model of MNIST: the layer's output is the fixed point of its own map.

    python -m examples.equilibrium_mnist                   # tables and picture
    python -m examples.equilibrium_mnist --method penalty  # one method
    python -m examples.equilibrium_mnist --tune            # choose the knobs on the grid

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

Besides them two models without an equilibrium: "softmax" (regression), and "network", the same
with W = 0, trained by the same rule for as many steps as the first method asked for. Knobs (Adam's
upper rate and T) are chosen on seed 100 with 1,000 images and 600 evaluations (``--tune --train
1000 --test 1000 --budget 600``) by the training loss at the solved equilibrium, never on the seeds
reported. All have the same budget of gradients, maps and products. Losses and accuracies are
those of the solved equilibrium; the clock (CPU time; wall time on a GPU) stands still meanwhile.

First the three are compared at one point, in float64: cosine and relative error to implicit
differentiation solved to 1e-12.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
from examples.equilibrium_mnist.report import draw, section
from examples.equilibrium_mnist.rows import METHODS, agreement, network, seen, softmax
from examples.shared import command
from examples.shared.experiment import Experiment, by_method, by_seed
from examples.shared.grid import print_best, settings
from examples.shared.record import Line
from examples.shared.run import Run
from torch_penalty_bilevel import FixedPoint, HypergradientOptimizer, PenaltyBilevelOptimizer

GRID = {"upper_lr": (3e-4, 1e-3, 3e-3), "lower_steps": (1, 5)}
TUNED = {"penalty": (3e-3, 5), "fixed_point": (3e-3, 5), "cg_normal": (3e-3, 5)}
TUNING_SEED = 100
SMOKE = {"train": 200, "test": 200, "width": 40, "budget": 60, "moments": 3}
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


def train(problem: Problem, setting: Line, width: int, budget: int, moments: int, run: Run) -> Line:
    """One method until ``budget`` evaluations, seen at ``moments`` of them."""
    like = problem.images
    p = make_parameters(setting["seed"], width, like.dtype, device=like.device)
    z = torch.zeros(len(problem.labels), width, dtype=like.dtype, device=like.device)
    z.requires_grad_()
    optimizer = make_optimizer(p, z, setting["method"], setting["upper_lr"], setting["lower_steps"])
    marks = np.unique(np.geomspace(10, budget, moments).astype(int)).tolist()
    count, path = [0, 0], []  # evaluations, steps
    for step in run.until(budget, lambda: count[0], *p.values(), z, optimizer, count, path):
        optimizer.step(lambda: loss_of(p, z, problem.labels), lambda: layer(p, z, problem.images))
        project(p["W"])
        count[:] = optimizer.metrics.gradient_evaluations, step + 1
        last = path[-1]["evaluations"] if path else 0
        if count[0] >= min((mark for mark in marks if mark > last), default=budget):
            with run.paused():
                now = {"seconds": run.seconds, "evaluations": count[0]}
                path.append({**now, **seen(p, problem)})
                run.show(step, loss=path[-1]["loss"], test=path[-1]["test"])
    return {**path[-1], "steps": count[1], "path": path}


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run of a method that is asked for, as the record knows it."""
    sizes = {name: getattr(options, name) for name in ("train", "test", "width")}
    moments = 1 if options.tune else options.moments
    return [
        {**sizes, "budget": options.budget, "moments": moments, "seed": seed, **setting}
        for seed in ([TUNING_SEED] if options.tune else command.seeds_of(options))
        for method in command.methods_of(options, METHODS)
        for setting in settings(method, GRID, TUNED[method], options)
    ]


def beside(plan: list[Line], experiment: Experiment) -> list[Line]:
    """The runs without an equilibrium: of each seed, beside the first method's."""
    found: list[Line] = []
    for line in (line for line in plan if line["method"] == plan[0]["method"]):
        common = {key: line[key] for key in ("train", "test", "width", "seed")}
        steps = experiment.record[line]["steps"]
        found.append({**common, "method": "softmax"})
        found.append({**common, "method": "network", "rate": line["upper_lr"], "steps": steps})
    return found


class Work:
    """Does one run after another."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.data = mnist(default_folder("mnist", options.data_dir))
        self.device = device

    def __call__(self, line: Line, run: Run) -> Line:
        """One row on one seed."""
        if line["method"] == "agreement":
            return agreement(self.data, line["width"], self.device)
        problem = make_problem(self.data, line["seed"], line["train"], line["test"])
        problem = Problem(*(part.to(self.device) for part in problem))
        if line["method"] == "softmax":
            return softmax(problem)
        if line["method"] == "network":
            return network(problem, line["seed"], line["width"], line["rate"], line["steps"], run)
        return train(problem, line, line["width"], line["budget"], line["moments"], run)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, f"{__doc__}\nThe grid: {GRID}.")
    add = parser.add_argument
    add("--tune", action="store_true", help="try the grid on the tuning seed, print the best")
    add("--upper-lr", type=command.rate, help="Adam's rate for u (tuned)")
    add("--lower-steps", type=command.count, help="T (tuned)")
    add("--train", type=command.count, default=5000, help="training images (5000)")
    add("--test", type=command.count, default=5000, help="test images (5000)")
    add("--width", type=command.count, default=200, help="length of z (200)")
    add("--moments", type=command.count, default=8, help="points of a path (8)")
    command.add_common(parser, METHODS, METHODS, 400, "gradients, maps and products", seeds=2)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment, plan = Experiment("equilibrium_mnist", options), planned(options)
    work = Work(options, experiment.device)
    if options.tune:
        experiment.perform(plan, work)
        print_best(command.methods_of(options, METHODS), plan, experiment.record, GRID, by="loss")
        return
    first = {"method": "agreement", "seed": 0, "width": options.width}

    def parts() -> Iterator[list[Line]]:
        for part in by_seed(plan):
            experiment.perform([first, *part], work)  # which says how long the simple ones take
            yield [first, *part, *beside(part, experiment)]

    def picture(content: Line, path: Path) -> None:
        draw(by_method(content["runs"]), path)

    experiment.report(parts(), work, picture, section)


if __name__ == "__main__":
    main()
