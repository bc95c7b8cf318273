r"""An equilibrium model of MNIST: the layer's output is the fixed point of its own map.

    python examples/equilibrium_mnist.py --method all   # table, agreement and picture
    python examples/equilibrium_mnist.py --tune         # choose the knobs on the grid

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
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _data import default_folder, mnist
from _record import Line, Record
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from torch_penalty_bilevel import (
    FixedPoint,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
    functional,
)

METHODS = ("penalty", "fixed_point", "cg_normal")
GRID = {"upper_lr": (3e-4, 1e-3, 3e-3), "lower_steps": (1, 5)}
TUNED = {"penalty": (3e-3, 5), "fixed_point": (3e-3, 5), "cg_normal": (3e-3, 5)}
TUNING_SEED = 100
RADIUS = 0.99
RECORD = Path("results/equilibrium_mnist.jsonl")  # delete it when the code has changed
PICTURE = Path("results/equilibrium_mnist.png")
Optimizer = PenaltyBilevelOptimizer | HypergradientOptimizer
Parameters = dict[str, Tensor]


class Problem(NamedTuple):
    """Images as rows of 784 numbers, and their digits."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def make_problem(data: tuple[Tensor, Tensor], seed: int, train: int, test: int) -> Problem:
    """Images drawn without replacement from all 70,000."""
    images, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = order[:train], order[train : train + test]
    return Problem(images[first], labels[first], images[second], labels[second])


def make_parameters(
    seed: int, width: int, dtype: torch.dtype = torch.float32, inputs: int = 784
) -> Parameters:
    """W (width, width) of spectral norm 0.5, U, b and a read-out, all to be learned."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=source, dtype=torch.float64) / shape[-1] ** 0.5
        return values.to(dtype)

    W = normal(width, width)
    parameters = {
        "W": 0.5 * W / torch.linalg.matrix_norm(W, 2),
        "U": normal(width, inputs),
        "b": torch.zeros(width, dtype=dtype),
        "C": normal(10, width),
        "c": torch.zeros(10, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in parameters.items()}


def layer(p: Parameters, z: Tensor, images: Tensor) -> Tensor:
    """The map, for all images: (n, width) to (n, width)."""
    return torch.tanh(z @ p["W"].T + images @ p["U"].T + p["b"])


def loss_of(p: Parameters, z: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the read-out, in nats."""
    return cross_entropy(z @ p["C"].T + p["c"], labels)


@torch.no_grad()
def equilibrium(p: Parameters, images: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Z with ||z - map(z)|| <= tolerance ||z||, by iterating the map from 0.

    Raises:
        RuntimeError: it does not get there in 10,000 iterations.
    """
    drive = images @ p["U"].T + p["b"]
    z = torch.zeros_like(drive)
    for _ in range(10_000):
        new = torch.tanh(z @ p["W"].T + drive)
        moved, z = (new - z).norm(), new
        if moved <= tolerance * z.norm():
            return z
    raise RuntimeError(f"no equilibrium: the last iteration moved z by {float(moved):.1e}")


@torch.no_grad()
def project(W: Tensor, radius: float = RADIUS) -> None:
    """The nearest matrix with spectral norm <= radius: singular values clipped, in place."""
    left, values, right = torch.linalg.svd(W)
    if float(values[0]) > radius:
        W.copy_((left * values.clamp(max=radius)) @ right)


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


@torch.no_grad()
def seen(p: Parameters, problem: Problem) -> Line:
    """Training loss and test accuracy at the solved equilibrium; the norm of W."""
    z = equilibrium(p, problem.images)
    outputs = equilibrium(p, problem.test_images) @ p["C"].T + p["c"]
    return {
        "loss": loss_of(p, z, problem.labels).item(),
        "test": (outputs.argmax(1) == problem.test_labels).double().mean().item(),
        "norm": torch.linalg.matrix_norm(p["W"], 2).item(),
    }


def baselines(problem: Problem, seed: int, width: int, upper_lr: float, steps: int) -> Line:
    """Softmax regression, and the network without W."""
    began = time.process_time()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(problem.images, problem.labels)
    linear = {
        "loss": float(-np.log(_of_labels(model, problem)).mean()),
        "test": float(model.score(problem.test_images, problem.test_labels)),
        "seconds": time.process_time() - began,
    }
    p = make_parameters(seed, width, problem.images.dtype)
    with torch.no_grad():
        p["W"].zero_()
    learned = [value for name, value in p.items() if name != "W"]
    rule, began = torch.optim.Adam(learned, lr=upper_lr), time.process_time()
    nothing = torch.zeros_like(p["b"])[None]
    for _ in range(steps):
        rule.zero_grad()
        loss_of(p, layer(p, nothing, problem.images), problem.labels).backward()
        rule.step()
    seconds = time.process_time() - began
    flat = {**seen(p, problem), "seconds": seconds, "steps": steps, "evaluations": steps}
    return {"softmax regression": linear, "network, W = 0": flat}


def _of_labels(model: LogisticRegression, problem: Problem) -> np.ndarray:
    rows = np.arange(len(problem.labels))
    return model.predict_proba(problem.images)[rows, problem.labels]


def hypergradients(p: Parameters, problem: Problem) -> dict[str, Tensor]:
    """What the three optimizers find at (p, z*(p)) if u is held, and the exact hypergradient.

    Each as one vector. The penalty's multiplier is given 2,000 lower steps.
    """
    start = equilibrium(p, problem.images, 1e-14)
    found = {}
    for method in METHODS:
        z = start.clone().requires_grad_()
        held = torch.optim.SGD(list(p.values()), lr=0.0)
        lower = torch.optim.SGD([z], lr=1.0)
        upper_loss = lambda z=z: loss_of(p, z, problem.labels)  # noqa: E731
        lower_map = lambda z=z: layer(p, z, problem.images)  # noqa: E731
        if method == "penalty":
            optimizer = PenaltyBilevelOptimizer(held, lower, penalty=FixedPoint())
            for _ in range(2000):
                optimizer.lower_step(upper_loss, lower_map)
            optimizer.upper_step(upper_loss, lower_map)
        else:
            HypergradientOptimizer(
                held,
                lower,
                method=method,
                inner_iterations=2000,
                tolerance=1e-12,
                lower_is_map=True,
            ).step(upper_loss, lower_map)
        found[method] = torch.cat([value.grad.ravel() for value in p.values()])
    exact, _ = functional.hypergradient(
        lambda p, z: loss_of(p, z, problem.labels),
        lambda p, z: layer(p, z, problem.images),
        p,
        start,
        method="cg_normal",
        lower_is_map=True,
        tolerance=1e-12,
    )
    found["exact"] = torch.cat([value.ravel() for value in exact.values()])
    return found


def agreement(data: tuple[Tensor, Tensor], width: int, samples: int = 100) -> str:
    """Cosines and relative errors of the three in Markdown, at a random point with ||W|| = 0.9."""
    drawn = make_problem(data, 0, samples, 1)
    problem = drawn._replace(images=drawn.images.double())
    p = make_parameters(0, width, torch.float64)
    with torch.no_grad():
        p["W"].mul_(0.9 / 0.5)
    found = hypergradients(p, problem)
    exact = found.pop("exact")
    lines = ["| hypergradient | 1 - cosine | relative error |", "|---|---|---|"]
    for method, vector in found.items():
        cosine = torch.cosine_similarity(vector, exact, dim=0)
        error = (vector - exact).norm() / exact.norm()
        lines.append(f"| {method} | {1 - float(cosine):.1e} | {float(error):.1e} |")
    return "\n".join(lines)


def table(results: dict[str, list[Line]]) -> str:
    """Medians over the seeds in Markdown, and the range where they differ."""
    names = ["test", "loss", "norm", "steps", "evaluations", "seconds"]
    lines = ["| row | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, runs in results.items():
        cells = [_cell([run[name] for run in runs if name in run]) for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    texts = [f"{f(values):.4g}" for f in (statistics.median, min, max)]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def draw(results: dict[str, list[Line]], path: Path) -> None:
    """Training loss and test accuracy of the first seed, against seconds and evaluations."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    figure.suptitle("Equilibrium model of MNIST, at the solved equilibrium")
    flat = {"loss": "training loss", "test": "test accuracy"}
    for row, (kind, label) in zip(axes, flat.items(), strict=True):
        row[0].set_ylabel(label)
        for axis, name in zip(row, ("seconds", "evaluations"), strict=True):
            for method in (m for m in METHODS if m in results):
                path_of = results[method][0]["path"]
                xs, ys = ([point[key] for point in path_of] for key in (name, kind))
                axis.plot(xs, ys, ".-", linewidth=1.3, label=method)
            simple = results["network, W = 0"][0][kind]
            axis.axhline(simple, color="black", linestyle=":", label="network, W = 0")
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[1, 0].set_ylim(bottom=0.7)
    axes[1, 0].set_xlabel("CPU seconds")
    axes[1, 1].set_xlabel("gradients, maps and products")
    axes[1, 1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nThe grid: {GRID}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def settings_of(method: str, options: argparse.Namespace) -> list[Line]:
    """The grid with ``--tune``; else the knobs from the command line or the tuned ones."""
    default = TUNED[method]
    given = (options.upper_lr, options.lower_steps)
    one = tuple(d if g is None else g for g, d in zip(given, default, strict=True))
    knobs = itertools.product(*GRID.values()) if options.tune else iter([one])
    return [{"method": method, **dict(zip(GRID, values, strict=True))} for values in knobs]


def main() -> None:
    """Run what is not in the record yet; print and draw what is."""
    options = parse()
    torch.set_num_threads(options.threads)
    data, record = mnist(options.folder), Record(options.record)
    methods = METHODS if options.method == "all" else (options.method,)
    first, count = (TUNING_SEED, 1) if options.tune else (options.first_seed, options.seeds)
    sizes = {name: getattr(options, name) for name in ("train", "test", "width")}
    common = {**sizes, "budget": options.evaluations}
    common["moments"] = 1 if options.tune else options.moments
    runs = [
        {**common, "seed": seed, **setting}
        for seed in range(first, first + count)
        for method in methods
        for setting in settings_of(method, options)
    ]
    todo = [run for run in runs if run not in record]
    with tqdm(total=len(todo) * options.evaluations, file=sys.stderr, mininterval=1) as bar:
        for run in todo:
            problem = make_problem(data, run["seed"], options.train, options.test)
            bar.set_description(run["method"])
            arguments = run["seed"], options.width, options.evaluations, run["moments"]
            record.add(run, train(problem, run, *arguments, bar.update))
    if options.tune:
        for method in methods:
            mine = [run for run in runs if run["method"] == method]
            best = min(mine, key=lambda run: record[run]["loss"])
            knobs = tuple(best[name] for name in GRID)
            print(f'"{method}": {knobs},  # {record[best]["loss"]:.4f}')
        return
    results = {m: [record[run] for run in runs if run["method"] == m] for m in methods}
    for run in runs:
        if run["method"] == methods[0]:
            rate, steps, seed = run["upper_lr"], record[run]["steps"], run["seed"]
            simple = {"row": "baselines", **common, "seed": seed, "rate": rate, "steps": steps}
            if simple not in record:
                problem = make_problem(data, seed, options.train, options.test)
                record.add(simple, baselines(problem, seed, options.width, rate, steps))
            for name, row in record[simple].items():
                results.setdefault(name, []).append(row)
    print(agreement(data, options.width), end="\n\n")
    print(table(results))
    draw(results, options.output)
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
