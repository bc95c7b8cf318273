"""Learn how much of each source of text a language model should train on.

    python -m examples.mix_sources                        # the penalty beside plain training
    python -m examples.mix_sources --method all --seeds 5
    python -m examples.mix_sources --every 1              # u moves with every step of training
    python -m examples.mix_sources --compile --width 256 --layers 4 --context 128

A small causal transformer trains on ten sources of 20 Newsgroups, of which four are corrupted
(letters shuffled within words, all letters shuffled, written backwards, random letters) and two on
other subjects. u is one weight per source, v the transformer; u wants v to do well on 20,000 clean
letters (``formulation.py``). Reported is the loss on other text of the same subjects.

Rows: "penalty"; "t1_t2", u by products of f's gradient with those of the sources; "doremi", excess
loss over a reference model, three trainings in all, the clean text unseen; equal weights
("uniform"), and so for half more steps, about the seconds of the penalty ("longer"); the clean text
alone ("target"); equal weights of what is not corrupted ("oracle"). All begin alike and see as many
letters of the sources per step.

What to read there: the penalty rejects what is corrupted most clearly, and ends as low as the
oracle in as many steps. T1-T2 ends as low at less cost, with a tenth of the mean weight left on
what is corrupted. Equal weights for half more steps ("longer"), which take about as many seconds as
the penalty, end lower than both in every seed: a model so far from trained still gains more from
more text than from a cleaner mixture.

The picture shows the weights along the runs, and the losses.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from examples.mix_sources.formulation import Mixing
from examples.mix_sources.methods import METHODS
from examples.mix_sources.problem import load, make_mixture
from examples.mix_sources.report import draw, section
from examples.mix_sources.training import train
from examples.mix_sources.transformer import Size
from examples.shared import command
from examples.shared.experiment import Experiment, by_seed, plan_of
from examples.shared.record import Line
from examples.shared.run import Run

DEFAULT = ("penalty", "uniform", "oracle")
SMOKE = {"width": 32, "layers": 1, "context": 16, "windows": 20, "budget": 40}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--every", type=command.count, default=4, help="steps of training per step of u (4)")
    add("--floor", type=float, default=1.0, help="least entropy of the weights, nats (1)")
    add("--width", type=command.count, default=64, help="of the transformer, in numbers (64)")
    add("--layers", type=command.count, default=2, help="(2)")
    add("--context", type=command.count, default=64, help="letters (64)")
    add(
        "--windows",
        type=command.count,
        default=20,
        help="of text per step, at least 10 (20)",
    )
    add("--compile", action="store_true", help="torch.compile the transformer; counts as time")
    command.add_common(parser, tuple(METHODS), DEFAULT, 1500, "steps of training", seeds=3)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    for name, least in (("every", 1), ("width", 1), ("layers", 1), ("context", 1), ("windows", 10)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if not 0 <= options.floor < math.log(10):
        parser.error(f"--floor must lie in [0, log(10)), got {options.floor}")
    return options


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; seed by seed."""
    keys = ("every", "floor", "width", "layers", "context", "windows", "compile", "budget")
    common = {key: getattr(options, key) for key in keys}
    return [
        {**common, "method": name, "seed": seed}
        for seed in command.seeds_of(options)
        for name in command.methods_of(options, tuple(METHODS))
    ]


class Rows:
    """Does one run after another, on the text of its seed."""

    def __init__(self, options: argparse.Namespace, experiment: Experiment) -> None:
        self.data, self.experiment = load(options.data_dir), experiment

    def __call__(self, line: Line, run: Run) -> Line:
        """One row on one seed."""
        torch.manual_seed(line["seed"])
        mixture = make_mixture(self.data, line["seed"]).to(self.experiment.device)
        size = Size(line["width"], line["layers"], line["context"])
        task = Mixing(mixture, size, line["windows"], line["floor"], line["compile"])
        return train(line["method"], task, line["budget"], line["every"], run)

    def draw(self, content: Line, path: Path) -> None:
        """The runs of the first seed."""
        first, _ = by_seed(plan_of(content))
        draw({line["method"]: [self.experiment.record[line]] for line in first}, path)


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment = Experiment("mix_sources", options)
    rows, plan = Rows(options, experiment), planned(options)
    experiment.report(by_seed(plan), rows, rows.draw, section)


if __name__ == "__main__":
    main()
