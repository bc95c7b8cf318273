"""The methods of ``few_shot`` with the knobs they were given, and one run of any of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.few_shot.bilevel import FixedSteps, Implicit, Penalty
from examples.few_shot.embedded import mean_and_interval
from examples.few_shot.encoders import Conv4, ResNet, normalised_by
from examples.few_shot.learner import Learner, Setting
from examples.few_shot.problem import (
    POOL,
    Size,
    Split,
    Tasks,
    meta_batch,
    prepared,
    tasks_of,
    test_tasks,
)
from examples.few_shot.rivals import Anil, Maml, Prototypes
from examples.shared.episodes import class_by_class
from examples.shared.memory import peak_on
from examples.shared.record import Line
from examples.shared.run import Run
from examples.shared.solvers import anneal

LOOKS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # shares of the budget
LOOK_TASKS = 200

# Chosen on seed 100 and the classes of --validation: Omniglot, 5-way 1-shot, conv4 of 64 channels,
# 12 seconds, meta-batches of 4 tasks with 15 query images per class, accuracy alone on 100 tasks
# (half an interval is 2 points). Tried:
# penalty: lr 1e-2 84.6, 2e-2 80.2; decay 0.1 83.9, 0.3 84.6, 1 84.3, 4 81.4;
#   tolerance 0.05 84.6 with 21 lower steps, 0.2 84.3 with 8.
# prototypes: lr 1e-2 86.9, 2e-2 80.0; sharpness 0.03 85.6, 0.1 86.9.
# maml: lr 3e-3 75.1, 1e-2 67.0 (rate 0.1), 63.2 (rate 0.4). anil: lr 1e-2, rate 0.1 79.8.
# implicit: rate 0.025 and decay 1 76.1, rate 0.1 and decay 0.3 67.3.
# The rows of 5 and 20 Adam steps take penalty's lr and decay, and the published rate 1e-2.
METHODS: dict[str, dict[str, Callable[[Setting], Learner]]] = {
    "omniglot": {
        "penalty": partial(Penalty, lr=1e-2, decay=0.3),
        "prototypes": partial(Prototypes, lr=1e-2, sharpness=0.1),
        "maml": partial(Maml, lr=3e-3, rate=0.1, steps=1),
        "anil": partial(Anil, lr=1e-2, rate=0.1, steps=5),
        "penalty_5": partial(
            FixedSteps, lr=1e-2, decay=0.3, steps=5, rate=1e-2, penalty="stationarity"
        ),
        "paper": partial(FixedSteps, lr=1e-2, decay=0.3, steps=20, rate=1e-2, penalty="paper"),
        "implicit": partial(Implicit, lr=1e-2, decay=1.0, rate=0.025, steps=10, warm=False),
        "implicit_warm": partial(Implicit, lr=1e-2, decay=1.0, rate=0.025, steps=10, warm=True),
    },
}
METHODS["miniimagenet"] = METHODS["omniglot"]  # nothing was tried there
NAMES = tuple(METHODS["omniglot"])


class Look(NamedTuple):
    """How good a learner is on tasks of unseen classes."""

    accuracies: Tensor
    """Of each task."""
    told: list[int]
    """Classes told for the query images of the first task."""


def make_encoder(name: str, split: Split, width: int) -> nn.Module:
    """Conv4 with ``width`` channels, or the published residual network."""
    channels = split.learned.shape[2]
    encoder = Conv4(channels, width) if name == "conv4" else ResNet(channels)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def judged(learner: Learner, images: Tensor, tasks: Tasks, is_transductive: bool) -> Look:
    """Look at ``tasks`` of ``images``."""
    told = learner.predictions(images, tasks, is_transductive).cpu()
    size = learner.setting.size
    truth = class_by_class(size.ways, told.shape[1] // size.ways)
    return Look((told == truth).float().mean(1), told[0].tolist())


class Course:
    """One method on one seed.

    Args:
        line: what defines the run.
        split: the data.
        run: its clock.
    """

    def __init__(self, line: Line, split: Split, run: Run) -> None:
        self.line, self.split, self.run = line, split, run
        self.size = Size(line["ways"], line["shots"], line["queries"])
        torch.manual_seed(line["seed"])
        encoder = make_encoder(line["encoder"], split, line["width"]).to(run.device)
        with torch.no_grad(), normalised_by(encoder, "running"):
            width = encoder(prepared(split.learned[0, :2], run.device)).shape[1]
        cosine = line["head"] == "cosine"
        setting = Setting(encoder, width, self.size, line["meta_batch"], cosine)
        self.learner = METHODS[line["dataset"]][line["method"]](setting)
        pool = split.unseen[:: max(1, len(split.unseen) // POOL)]
        generator = torch.Generator().manual_seed(0)  # the same tasks for all
        self.pool = pool
        self.looks = tasks_of(pool, self.size, min(LOOK_TASKS, line["test_tasks"]), generator)
        self.learning = self.size._replace(queries=line["train_queries"])
        self.how = line["budget"], line["meta_batch"]
        self.path: list[Line] = []

    def __call__(self) -> Line:
        """Until the budget is spent, the rate of u falling to 0 along a cosine; then the test."""
        learner, run, (budget, tasks) = self.learner, self.run, self.how
        seed = self.line["seed"]
        generator = torch.Generator().manual_seed(seed)  # equal tasks for all methods
        kept: tuple[Any, ...] = (learner.encoder, learner.lower_steps, generator, self.path)
        tested: Line | None = None
        for step in run.until(budget, lambda: run.clock, *kept, *learner.kept()):
            self._look(step)
            anneal([learner.upper_rule], run.clock / budget)
            data = self.split.learned, self.learning, tasks, generator, run.device
            learner.step(meta_batch(*data))
            if run.clock >= budget:
                self._look(step + 1)
                with run.paused():  # in the loop: until it is done the checkpoint stays
                    tested = self._tested()
        tested = tested or self._tested()
        drawn = meta_batch(self.split.learned, self.learning, tasks, generator, run.device)
        with run.paused():  # one more, after the test
            tested["peak_bytes"] = peak_on(run.device, lambda: learner.step(drawn))
        steps = self.path[-1]["step"]
        each = learner.lower_steps[0] / steps
        reached = {"seconds": run.seconds, "steps": steps, "lower_steps": each}
        return {"path": self.path, **reached, **tested}

    def _look(self, step: int) -> None:
        while len(self.path) < len(LOOKS):
            if self.run.clock < LOOKS[len(self.path)] * self.how[0]:
                return
            with self.run.paused():
                look = judged(self.learner, self.pool, self.looks, False)
            accuracy, interval = mean_and_interval(look.accuracies)
            self.path.append(
                {"step": step, "seconds": self.run.clock, "accuracy": accuracy}
                | {"interval": interval}
            )
            self.run.show(step, accuracy=accuracy)

    def _tested(self) -> Line:
        """On the test tasks, without and with statistics of their query images."""
        tasks = test_tasks(self.split, self.size, self.line["test_tasks"])
        found: Line = {}
        for name, is_transductive in (("alone", False), ("transductive", True)):
            look = judged(self.learner, self.split.unseen, tasks, is_transductive)
            found[name], found[f"{name}_interval"] = mean_and_interval(look.accuracies)
            found.setdefault("told", look.told)
        return found
