r"""How much harm can poisoned training data do? For auditing how robust a model is.

    python -m examples.poison --attack untargeted              # 60 images among 1,000: MNIST
    python -m examples.poison --attack targeted --seeds 10     # eights taken for threes
    python -m examples.poison --attack perturbation            # labels kept, images changed
    python -m examples.poison --attack perturbation --train 45000 --validation 15000 \
        --poisons 9000                                         # the published size
    python -m examples.poison --attack clean_label             # one image, its label right
    python -m examples.poison --attack clean_label --dataset dogfish

The attacker chooses pixels u, knowing how the victim trains; each attack is a file that has its
two losses (``untargeted.py`` and so on). Whoever trains on data of unknown origin can see with
these how far a few bad images reach, and what the matching defence gives: per-sample weights
learned from a few trusted images (``defence.py``, as ``examples.denoise``).

Every row ends with a victim that is trained from scratch to convergence, by one recipe. Simple
rows: no poison ("clean"), the trusted images alone ("trusted"), noise ("random"), copies of
training images with wrong labels ("flip", where the attacks begin), training images whose label is
made wrong ("flip_in_place"), the base image itself ("base"). Optimised: "penalty"; "approx_grad",
"cg" and "reverse" by HypergradientOptimizer. "alternating" leaves out the implicit term; only the
clean-label f has something for it then, the collision of features.

The picture shows poisons beside their originals, and the victims against the work done.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from examples.poison.attack import Attack
from examples.poison.clean_label import CleanLabel
from examples.poison.defence import STEPS, defended
from examples.poison.methods import METHODS, optimise
from examples.poison.report import draw, section
from examples.poison.setting import (
    ATTACKS,
    BUDGETS,
    DIGITS,
    NETWORK,
    RATES,
    SIZES,
    SMALL_NETWORK,
    SMOKE,
    Attacks,
)
from examples.shared import command
from examples.shared.experiment import Experiment, by_seed, plan_of
from examples.shared.record import Line, place_of
from examples.shared.run import Run

ROWS = ("clean", "trusted", "random", "flip", "flip_in_place", "base")
NAMES = (*ROWS, *METHODS)
DEFAULT = (*ROWS, "penalty")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--attack", choices=ATTACKS, default="untargeted", help="(untargeted)")
    for key in ("train", "validation", "poisons"):
        sizes = {name: chosen[key] for name, chosen in SIZES.items()}
        add(f"--{key}", type=command.count, help=f"images ({sizes})")
    add(
        "--dataset", choices=("miniimagenet", "dogfish"), default="miniimagenet", help="clean_label"
    )
    add(
        "--targets",
        type=command.count,
        default=20,
        help="of clean_label, per seed (20); budget: 300",
    )
    most = BUDGETS["untargeted"]  # of a target of clean_label less, see there
    command.add_common(parser, NAMES, DEFAULT, most, "gradients and products", seeds=3)
    parser.set_defaults(budget=None)
    options = parser.parse_args()
    options.budget = options.budget or BUDGETS[options.attack]
    if options.out == parser.get_default("out"):  # a folder of each attack, with its own table
        options.out = options.out.with_name(f"poison_{options.attack}")
    for key, value in SIZES.get(options.attack, {}).items():
        setattr(options, key, value if getattr(options, key) is None else getattr(options, key))
    if options.smoke:
        vars(options).update(SMOKE[options.attack])
    if options.attack in DIGITS:
        least = 1 + (options.attack == "targeted")
        if not least <= options.poisons < options.train:
            parser.error(f"--poisons must lie in [{least}, --train), got {options.poisons}")
        if options.train + options.validation > 59000:
            parser.error("--train and --validation leave no trusted images of 60,000")
    return options


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; seed by seed, target by target."""
    names = command.methods_of(options, NAMES)
    if options.attack in DIGITS:
        keys, targets = ("attack", "train", "validation", "poisons"), [{}]
        common = {key: getattr(options, key) for key in keys}
        rows = DIGITS[options.attack][0].rows
    else:
        common = {"attack": options.attack, "dataset": options.dataset, "poisons": 1}
        common["network"] = SMALL_NETWORK if options.smoke else NETWORK
        targets = [{"target": number} for number in range(options.targets)]
        rows = CleanLabel.rows
    if options.smoke:
        common["defence_steps"] = 30
    kept = [name for name in names if name in (*rows, *RATES[options.attack])]
    if not kept:
        raise SystemExit(
            f"--attack {options.attack} has no {' '.join(names)}; it has {' '.join(rows)}"
        )
    return [
        {**common, "method": name, "seed": seed, **target}
        | ({"budget": options.budget} if name in METHODS else {})
        for seed in command.seeds_of(options)
        for target in targets
        for name in kept
    ]


class Rows:
    """Does one run after another, on the data of its seed."""

    def __init__(self, options: argparse.Namespace, experiment: Experiment) -> None:
        self.make, self.experiment = Attacks(options.data_dir, experiment.device), experiment

    def poisons(self, line: Line) -> Path:
        """Where those of a run are, for the picture."""
        return self.experiment.out / "poisons" / f"{place_of(line)}.pt"

    def __call__(self, line: Line, run: Run) -> Line:
        """One row on one seed."""
        torch.manual_seed(line["seed"])
        task, name, began = self.make(line), line["method"], time.process_time()
        if name in METHODS:
            rates = RATES[line["attack"]][name]
            images, result = optimise(name, task, rates, line["budget"], run)
            self.poisons(line).parent.mkdir(parents=True, exist_ok=True)
            torch.save(images.cpu(), self.poisons(line))
            training = task.with_poisons(images)
        else:
            training, result = task.row(name), {}
        result |= task.score(task.victim(training))
        result.setdefault("seconds", time.process_time() - began)
        if name == "trusted":
            return result
        return result | defended(task, training, line.get("defence_steps", STEPS))

    def draw(self, content: Line, path: Path) -> bool:
        """The runs of the first seed, with the poisons of "penalty", else of another method."""
        first = [line for line in by_seed(plan_of(content))[0] if line.get("target", 0) == 0]
        results = {line["method"]: [self.experiment.record[line]] for line in first}
        learned = sorted(set(METHODS) & set(results), key=lambda name: name != "penalty")
        if not learned:
            return False
        chosen = next(line for line in first if line["method"] == learned[0])
        task = self.make(chosen)
        after = torch.load(self.poisons(chosen), weights_only=True)
        pairs = as_images(task.data.poisons.inputs.cpu()), as_images(after)
        title = f"{chosen['attack']}: poisons of {chosen['method']}"
        draw(pairs, labels_of(task), results, task.measure, title, path)
        return True


def as_images(inputs: torch.Tensor) -> torch.Tensor:
    """Rows of 784 pixels as images."""
    return inputs.reshape(-1, 1, 28, 28) if inputs.dim() == 2 else inputs


def labels_of(task: Attack) -> list[str]:
    """What each poison shows and what it is called."""
    pairs = zip(task.data.truth.tolist(), task.data.poisons.labels.tolist(), strict=True)
    return [f"{true}, called {given}" for true, given in pairs]


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment = Experiment("poison", options)
    rows, plan = Rows(options, experiment), planned(options)
    experiment.report(by_seed(plan), rows, rows.draw, section, picture=options.attack)


if __name__ == "__main__":
    main()
