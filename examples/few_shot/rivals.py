"""Learners that are not bilevel optimisation: prototypes, and unrolled gradient steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from examples.few_shot.embedded import each_task
from examples.few_shot.encoders import normalised_by
from examples.few_shot.fitted import longer
from examples.few_shot.formulation import Features, features_of
from examples.few_shot.learner import Learner, Setting, device_of
from examples.few_shot.problem import Images, Tasks
from examples.shared.episodes import class_by_class, mean_cross_entropy
from examples.shared.solvers import library


class Prototypes(Learner):
    """Not bilevel: scores fall with the squared distance to the mean of a class.

    Args:
        sharpness: by how much.
    """

    def __init__(self, setting: Setting, lr: float, sharpness: float) -> None:
        super().__init__(setting)
        self.sharpness = sharpness
        self.upper_rule = Adam(self.encoder.parameters(), lr=lr)

    def kept(self) -> tuple[Any, ...]:
        """Adam."""
        return (self.upper_rule,)

    def step(self, images: Images) -> None:
        """One meta-iteration."""
        scores = self.scores(features_of(self.encoder, images, self.setting.tasks))
        _step(self.upper_rule, mean_cross_entropy(scores, self.setting.size.ways))

    def scores(self, features: Features) -> Tensor:
        """-sharpness ||x - mean of the class||^2, up to what is the same for all classes."""
        support, query = features
        means = support.unflatten(1, (self.setting.size.ways, -1)).mean(2)
        return self.sharpness * (2 * query @ means.mT - means.square().sum(2)[:, None])


class Anil(Learner):
    """Differentiates through gradient steps of the head, whose start is learned too.

    Args:
        rate: of the steps.
        steps: their number.
    """

    def __init__(self, setting: Setting, lr: float, rate: float, steps: int) -> None:
        super().__init__(setting)
        self.rate, self.steps = rate, steps
        device = device_of(self.encoder)
        self.head = nn.Linear(setting.width, setting.size.ways, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        self.upper_rule = Adam(parameters, lr=lr)

    def kept(self) -> tuple[Any, ...]:
        """The start of heads, and Adam."""
        return self.head, self.upper_rule

    def step(self, images: Images) -> None:
        """One meta-iteration."""
        scores = self._adapted(features_of(self.encoder, images, self.setting.tasks), True)
        _step(self.upper_rule, mean_cross_entropy(scores, self.setting.size.ways))
        self.lower_steps[0] += self.steps

    def scores(self, features: Features) -> Tensor:
        """After as many steps."""
        with torch.enable_grad():
            return self._adapted(features, False).detach()

    def _adapted(self, features: Features, keep_graph: bool) -> Tensor:
        x, tasks = longer(features.support), len(features.support)
        rows = torch.cat([self.head.weight, self.head.bias[:, None]], 1).expand(tasks, -1, -1)
        for _ in range(self.steps):
            loss = tasks * mean_cross_entropy(x @ rows.mT, self.setting.size.ways)
            (slope,) = torch.autograd.grad(loss, rows, create_graph=keep_graph)
            rows = rows - self.rate * slope
        return longer(features.query) @ rows.mT


class Maml(Learner):
    """Differentiates through gradient steps of the whole network, unrolled by higher.

    Batch statistics are those of the images at hand, as published; so without the query images
    they are those of the support set.

    Args:
        rate: of the steps.
        steps: their number in training; three more in a test.
    """

    alone = None

    def __init__(self, setting: Setting, lr: float, rate: float, steps: int) -> None:
        super().__init__(setting)
        self.rate, self.steps, self.higher = rate, steps, library("higher")
        device = device_of(self.encoder)
        head = nn.Linear(setting.width, setting.size.ways, device=device)
        self.model = nn.Sequential(self.encoder, head)
        self.upper_rule = Adam(self.model.parameters(), lr=lr)

    def kept(self) -> tuple[Any, ...]:
        """The start of heads, and Adam."""
        return self.model[1], self.upper_rule

    def step(self, images: Images) -> None:
        """One meta-iteration, task by task."""
        tasks = self.setting.tasks
        rule = torch.optim.SGD(self.model.parameters(), lr=self.rate)
        self.upper_rule.zero_grad()
        with normalised_by(self.encoder, "batch"):
            for support, query in zip(*(part.chunk(tasks) for part in images), strict=True):
                with self.higher.innerloop_ctx(self.model, rule, copy_initial_weights=False) as (
                    copy,
                    inner,
                ):
                    for _ in range(self.steps):
                        inner.step(self._loss(copy(support)))
                    (self._loss(copy(query)) / tasks).backward()
        self.upper_rule.step()
        self.lower_steps[0] += self.steps

    def predictions(self, images: Tensor, tasks: Tasks, is_transductive: bool) -> Tensor:
        """Every task by a network of its own."""
        told: list[Tensor] = []
        for task in each_task(images, tasks, self.setting.size.shots, self.encoder):
            told.append(self._scores(task, is_transductive).argmax(-1))
        return torch.stack(told)

    def _scores(self, task: Images, is_transductive: bool) -> Tensor:
        count, both = len(task.support), torch.cat(task)
        values = {name: p.detach().requires_grad_() for name, p in self.model.named_parameters()}
        with normalised_by(self.encoder, "batch"), torch.enable_grad():
            for _ in range(self.steps + 3):
                loss = self._loss(functional_call(self.model, values, (task.support,)))
                slopes = torch.autograd.grad(loss, list(values.values()))
                values = {
                    name: (p - self.rate * slope).detach().requires_grad_()
                    for (name, p), slope in zip(values.items(), slopes, strict=True)
                }
        if is_transductive:
            with normalised_by(self.encoder, "batch"), torch.no_grad():
                return functional_call(self.model, values, (task.query,))
        with normalised_by(self.encoder, count), torch.no_grad():
            return functional_call(self.model, values, (both,))[count:]

    def _loss(self, scores: Tensor) -> Tensor:
        ways = self.setting.size.ways
        return cross_entropy(scores, class_by_class(ways, len(scores) // ways, scores.device))

    def scores(self, features: Features) -> Tensor:
        """There are no features apart from a task."""
        raise NotImplementedError


def _step(rule: Optimizer, loss: Tensor) -> None:
    rule.zero_grad()
    loss.backward()
    rule.step()
