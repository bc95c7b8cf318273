"""Learn features from which a new task is learned with one image per class.

    python -m examples.few_shot                                   # Omniglot, 5-way 1-shot
    python -m examples.few_shot --method all --seeds 3            # with every rival
    python -m examples.few_shot --ways 20 --meta-batch 2 --budget 3600
    python -m examples.few_shot --dataset miniimagenet --shots 5
    python -m examples.few_shot --dataset miniimagenet --encoder resnet --meta-batch 2
    python -m examples.few_shot --head cosine                     # the published heads

The encoder is the upper level, one head per task the lower one (``formulation.py``). After Mehra &
Hamm (ACML 2021). Every method has the same encoder, start and sequence of tasks, and the same time:
``--budget`` counts seconds of CPU (elsewhere: of wall time), so a repeated run takes as many
meta-iterations as the machine allows.

penalty: lower steps on held features until v and q are solved. penalty_5, paper: 5 and 20 Adam
steps from zero instead, paper with the published schedule. implicit: 10 gradient steps, 10 of
conjugate gradients; implicit_warm: heads go on from the tasks before. maml (unrolled by higher),
anil: through gradient steps of everything, of the head. prototypes: nearest mean.

Accuracy is the mean over test tasks of classes never seen, with a 95 % interval over them. Batch
normalisation: "alone" uses no query image (statistics of training; maml: of the support set),
"transductive" those of all query images of the task, as the published code does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.few_shot import problem
from examples.few_shot.methods import NAMES, Course
from examples.few_shot.report import draw, section
from examples.shared import command
from examples.shared.experiment import Experiment, plan_of
from examples.shared.record import Line
from examples.shared.run import Run

DEFAULT = ("penalty", "maml", "prototypes")
SMOKE = {"width": 8, "meta_batch": 2, "test_tasks": 4, "budget": 1, "queries": 5}
KEYS = (
    *("dataset", "ways", "shots", "queries", "train_queries", "encoder", "width", "head"),
    *("meta_batch", "test_tasks", "validation", "budget"),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--dataset", choices=("omniglot", "miniimagenet"), default="omniglot", help="(omniglot)")
    add("--ways", type=command.count, default=5, help="classes of a task (5)")
    add("--shots", type=command.count, default=1, help="images of each to fit a head (1)")
    add(
        "--queries",
        type=command.count,
        default=15,
        help="images of each that judge it (15)",
    )
    add(
        "--train-queries",
        type=command.count,
        default=5,
        help="in training (5; published: 15)",
    )
    add("--encoder", choices=("conv4", "resnet"), default="conv4", help="(conv4)")
    add("--width", type=command.count, help="channels of conv4 (64; mini-ImageNet: 32)")
    add("--head", choices=("linear", "cosine"), default="linear", help="of bilevel rows (linear)")
    add(
        "--meta-batch",
        type=command.count,
        default=10,
        help="tasks per u-step (10; published: 30)",
    )
    add("--test-tasks", type=command.count, default=600, help="tasks of unseen classes (600)")
    add("--validation", action="store_true", help="test on classes for choosing knobs")
    command.add_common(parser, NAMES, DEFAULT, 25, "seconds", seeds=1)
    options = parser.parse_args()
    if options.width is None:
        options.width = 64 if options.dataset == "omniglot" else 32
    if options.smoke:
        vars(options).update(SMOKE)
    for name in ("ways", "shots", "queries", "train_queries", "width", "meta_batch", "test_tasks"):
        if getattr(options, name) < (2 if name in ("ways", "test_tasks") else 1):
            parser.error(f"--{name.replace('_', '-')} is too small: {getattr(options, name)}")
    return options


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; seed by seed."""
    common = {key: getattr(options, key) for key in KEYS}
    return [
        {**common, "method": name, "seed": seed}
        for seed in command.seeds_of(options)
        for name in command.methods_of(options, NAMES)
    ]


class Rows:
    """Does one run after another."""

    def __init__(self, options: argparse.Namespace, experiment: Experiment) -> None:
        self.split = problem.load(options.dataset, options.data_dir, options.validation)
        self.size = problem.Size(options.ways, options.shots, options.queries)
        problem.check(self.split, self.size, options.meta_batch)
        learning = self.size._replace(queries=options.train_queries)
        problem.check(self.split, learning, options.meta_batch)
        self.experiment = experiment

    def __call__(self, line: Line, run: Run) -> Line:
        """One method on one seed."""
        return Course(line, self.split, run)()

    def draw(self, content: Line, path: Path) -> None:
        """Of all runs so far, with the first method's predictions for the first test task."""
        plan = plan_of(content)
        done = [(line, self.experiment.record[line]) for line in plan]
        shown = problem.test_tasks(self.split, self.size, plan[0]["test_tasks"])
        draw(done, self.split.unseen[shown.classes[0], shown.images[0]], self.size, path)


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment = Experiment("few_shot", options)
    rows, plan = Rows(options, experiment), planned(options)
    parts = (plan[:count] for count in range(1, len(plan) + 1))  # to see after every run
    experiment.report(parts, rows, rows.draw, section)


if __name__ == "__main__":
    main()
