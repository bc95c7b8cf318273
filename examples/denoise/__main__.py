"""Find wrong labels by learning one weight per training image, from a few clean images.

    python -m examples.denoise                                    # MNIST, 50 % wrong labels
    python -m examples.denoise --dataset digits                   # seconds, no download
    python -m examples.denoise --method all --seeds 5             # with torchopt, higher, ...
    python -m examples.denoise --model linear --clean 5000        # the published small setting
    python -m examples.denoise --model cnn --train 59000 --noise 0.25
    python -m examples.denoise --dataset cifar10 --noise 0.25
    python -m examples.denoise --flip pair --noise 0.4            # wrong labels with a system

The network trains on the weighted noisy images, the weights want it to do well on the clean ones
(``formulation.py``). After Mehra & Hamm (ACML 2021), "data denoising by importance learning".

Rows that learn weights show the running network v and, like all others, a fresh one trained on
the clean images and those with weight above one half (digits: all, as weighted). Simple rows: the
clean images alone ("validation"), everything ("noisy"), what a model of the clean images agrees
with ("agreement"), what an early-stopped model of everything agrees with ("self_filter"; digits:
one with decay), the right labels ("oracle").
"gap closed": 0 as "validation", 1 as "oracle", by the better of the two networks.

The picture shows the images with the lowest weights, the runs, and the learned weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from examples.denoise.formulation import Cleaning
from examples.denoise.learned import METHODS, learn, score
from examples.denoise.problem import MODELS, Problem, load, make_problem
from examples.denoise.report import draw, section
from examples.denoise.rows import ROWS, accuracy, fit
from examples.denoise.settings import SETTINGS
from examples.shared import command
from examples.shared.experiment import Experiment, by_seed, plan_of
from examples.shared.record import Line, place_of
from examples.shared.run import Run

NAMES = (*ROWS, *METHODS)
DEFAULT = (*ROWS, "penalty")
SMOKE = {"train": 200, "clean": 50, "budget": 90}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    own = "; ".join(
        f"{name}: {s.model}, {s.train}, {s.clean}, {s.budget}" for name, s in SETTINGS.items()
    )
    add("--dataset", choices=tuple(SETTINGS), default="mnist", help="(mnist)")
    add("--model", choices=MODELS, help=f"by default model, train, clean, budget are {own}")
    add("--train", type=command.count, help="noisy images")
    add("--clean", type=command.count, help="clean images, equally many per class")
    add("--noise", type=float, default=0.5, help="share of wrong labels (0.5)")
    add("--clean-share", type=float, help="weight s of f in g (0.2; published: 0)")
    add("--flip", choices=("uniform", "pair"), default="uniform", help="(uniform)")
    add("--epochs-share", type=float, default=1.0, help="of plain trainings; less do of many (1)")
    command.add_common(parser, NAMES, DEFAULT, 3000, "gradients and products", seeds=3)
    parser.set_defaults(budget=None)
    options = parser.parse_args()
    setting = SETTINGS[options.dataset]
    for name in ("model", "train", "clean", "budget", "clean_share"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(setting, name))
    if options.smoke:
        vars(options).update(SMOKE)
    if (options.dataset, options.model) == ("digits", "cnn"):
        parser.error("--model cnn needs images of 28 x 28 or more, digits has 8 x 8: try tanh")
    if not 0 <= options.noise < 1:
        parser.error(f"--noise must lie in [0, 1), got {options.noise}")
    if not 0 <= options.clean_share < math.inf:
        parser.error(f"--clean-share must be at least 0, got {options.clean_share}")
    if not 0 < options.epochs_share <= 1:
        parser.error(f"--epochs-share must lie in (0, 1], got {options.epochs_share}")
    if options.train < 1:
        parser.error(f"--train must be at least 1, got {options.train}")
    if options.clean < 10 or options.clean % 10:
        parser.error(f"--clean must be a positive multiple of 10, got {options.clean}")
    return options


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; seed by seed."""
    keys = ("dataset", "model", "train", "clean", "noise", "flip")
    learning = {"budget": options.budget, "clean_share": options.clean_share}
    common = {key: getattr(options, key) for key in keys}
    if options.epochs_share != 1:
        common["epochs_share"] = options.epochs_share
    return [
        {**common, "method": name, "seed": seed} | (learning if name in METHODS else {})
        for seed in command.seeds_of(options)
        for name in command.methods_of(options, NAMES)
    ]


class Rows:
    """Does one run after another, on the data of its seed."""

    def __init__(self, options: argparse.Namespace, experiment: Experiment) -> None:
        self.data = load(options.dataset, options.data_dir)
        self.setting = SETTINGS[options.dataset]
        self.experiment = experiment
        self._problem: Problem | None = None

    def problem(self, line: Line) -> Problem:
        """The data of a run; those of the last seed are kept."""
        if self._problem is None or self._problem.seed != line["seed"]:
            keys = ("model", "train", "clean", "noise", "flip")
            sizes = {key: line[key] for key in keys}
            made = make_problem(self.data, line["seed"], grey=line["dataset"] == "svhn", **sizes)
            self._problem = made.to(self.experiment.device)
        return self._problem

    def weights(self, line: Line) -> Path:
        """Where those of a run are, for the picture."""
        return self.experiment.out / "weights" / f"{place_of(line)}.pt"

    def __call__(self, line: Line, run: Run) -> Line:
        """One row on one seed."""
        problem, name = self.problem(line), line["method"]
        how = self.setting.training.shorter(line.get("epochs_share", 1.0))
        torch.manual_seed(problem.seed)
        if name in METHODS:
            setting = self.setting
            task = Cleaning(problem, line["clean_share"], setting.decay, setting.batch)
            scores, result = learn(name, task, setting.methods[name], line["budget"], run)
            self.weights(line).parent.mkdir(parents=True, exist_ok=True)
            torch.save(scores.cpu(), self.weights(line))
        else:
            began = time.process_time()
            scores = ROWS[name](problem, how)
            result = {"seconds": time.process_time() - began}
        model = fit(problem, scores, name, how)
        result["retrained"] = accuracy(model, problem.test_images, problem.test_labels)
        return result | score(scores, problem)

    def draw(self, content: Line, path: Path) -> bool:
        """The runs of the first seed, with the weights of "penalty", else of another method."""
        first, _ = by_seed(plan_of(content))
        results = {line["method"]: [self.experiment.record[line]] for line in first}
        learned = sorted(set(METHODS) & set(results), key=lambda name: name != "penalty")
        if not learned:
            return False
        chosen = next(line for line in first if line["method"] == learned[0])
        title = f"{chosen['dataset']}, {chosen['noise']:.0%} wrong labels ({chosen['flip']})"
        weights = torch.load(self.weights(chosen), weights_only=True)
        draw(self.problem(chosen), weights, results, title, path)
        return True


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment = Experiment("denoise", options)
    rows, plan = Rows(options, experiment), planned(options)
    experiment.report(by_seed(plan), rows, rows.draw, section)


if __name__ == "__main__":
    main()
