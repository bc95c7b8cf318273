"""What learns an encoder: this package's optimizers, and their rivals, on the same tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from examples.few_shot.embedded import each_task, embedded
from examples.few_shot.encoders import Statistics, normalised_by
from examples.few_shot.fitted import COSINE_RATE, fitted, fitted_cosine, longer
from examples.few_shot.formulation import (
    Features,
    FewShot,
    features_of,
    meta_step,
    penalty_optimizer,
)
from examples.few_shot.problem import Images, Size, Tasks
from examples.shared.episodes import class_by_class, mean_cross_entropy
from examples.shared.solvers import library
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import StackedHeads


class Setting(NamedTuple):
    """What all learners get."""

    encoder: nn.Module
    width: int
    """Features."""
    size: Size
    tasks: int
    """Of a meta-batch."""
    cosine: bool


class Learner(ABC):
    """An encoder, and a rule for a new task."""

    alone: Statistics | None = "running"
    """Statistics that see no query image: those of training; None: of the support set alone."""
    upper_rule: Optimizer

    def __init__(self, setting: Setting) -> None:
        self.setting, self.encoder = setting, setting.encoder
        self.lower_steps = [0]
        """So far; a list, for a checkpoint."""

    @abstractmethod
    def step(self, images: Images) -> None:
        """One meta-iteration."""

    @abstractmethod
    def kept(self) -> tuple[Any, ...]:
        """What changes beside the encoder and ``lower_steps``."""

    @abstractmethod
    def scores(self, features: Features) -> Tensor:
        """Of new tasks' query images, (tasks, images, ways)."""

    def predictions(self, images: Tensor, tasks: Tasks, is_transductive: bool) -> Tensor:
        """Classes (tasks, ways * queries) told for the query images of ``tasks``."""
        size = self.setting.size
        statistics = "batch" if is_transductive else self.alone
        features = embedded(self.encoder, images, tasks, size.shots, statistics)
        return self.scores(features).argmax(-1)


class Bilevel(Learner):
    """Heads are the lower level; a new task's is fitted from zero to the end."""

    optimizer: Any
    """Of both levels."""

    def __init__(self, setting: Setting, decay: float) -> None:
        super().__init__(setting)
        encoder, width, size, tasks, cosine = setting
        heads = StackedHeads(tasks, width, size.ways, cosine=cosine, device=_device(encoder))
        self.task = FewShot(encoder, heads, decay)

    def kept(self) -> tuple[Any, ...]:
        """Heads may go on."""
        return self.task.heads, self.optimizer

    def scores(self, features: Features) -> Tensor:
        """By heads of their own."""
        how = self.setting.size.ways, self.task.decay
        if self.setting.cosine:
            with torch.enable_grad():
                return fitted_cosine(features.support, *how)(features.query)
        return longer(features.query) @ fitted(features.support, *how).mT


class Penalty(Bilevel):
    """The penalty method, lower steps until the certificate says that v and q are solved."""

    def __init__(
        self, setting: Setting, lr: float, decay: float, tolerance: float = 0.05, most: int = 100
    ) -> None:
        super().__init__(setting, decay)
        self.tolerance, self.most = tolerance, most
        self.optimizer = self._optimizer(lr)
        self.upper_rule = self.optimizer.upper

    def _optimizer(self, lr: float) -> PenaltyBilevelOptimizer:
        if not self.setting.cosine:
            return penalty_optimizer(self.task, lr)
        return _with_adam(self.task, lr, COSINE_RATE, "stationarity")  # g is not convex

    def step(self, images: Images) -> None:
        """See ``meta_step``."""
        how = self.optimizer, images, self.tolerance, self.most
        self.lower_steps[0] += meta_step(self.task, *how)


class FixedSteps(Penalty):
    """A fixed number of Adam steps from zero, on held features."""

    def __init__(
        self, setting: Setting, lr: float, decay: float, steps: int, rate: float, penalty: str
    ) -> None:
        self.rate, self.penalty = rate, penalty
        super().__init__(setting, lr, decay, tolerance=0.0, most=steps)

    def _optimizer(self, lr: float) -> PenaltyBilevelOptimizer:
        return _with_adam(self.task, lr, self.rate, self.penalty)


def _with_adam(task: FewShot, lr: float, rate: float, penalty: str) -> PenaltyBilevelOptimizer:
    return PenaltyBilevelOptimizer(
        task.encoder.parameters(),
        task.heads.parameters(),
        upper_lr=lr,
        lower_lr=rate,
        penalty=penalty,
        curvature="double_backward",
        allow_unused=True,
    )


class Implicit(Bilevel):
    """Ten gradient steps on held features, then ten of conjugate gradients for q.

    Args:
        warm: heads and q go on from the meta-batch before, though its tasks were others.
    """

    def __init__(
        self, setting: Setting, lr: float, decay: float, rate: float, steps: int, warm: bool
    ) -> None:
        if setting.cosine:
            raise SystemExit(
                "implicit rows need --head linear: g of a cosine has no definite Hessian, and "
                "gradient steps from short rows diverge"
            )
        super().__init__(setting, decay)
        self.warm, self.steps, self._is_known = warm, steps, False
        heads = self.task.heads.parameters()
        self.optimizer = HypergradientOptimizer(
            self.encoder.parameters(),
            torch.optim.SGD(heads, lr=rate * setting.tasks),  # g is a mean over tasks
            upper_lr=lr,
            method="cg",
            inner_iterations=steps,
            warm_start=True,
            curvature="double_backward",
            allow_unused=True,
        )
        self.upper_rule = self.optimizer.upper

    def step(self, images: Images) -> None:
        """One meta-iteration."""
        task = self.task
        if not self._is_known:  # the first evaluation uses the features' graph up
            start = [p.detach().clone() for p in task.heads.parameters()]
            task.begin(images, keep_heads=True)
            self.optimizer.lower_step(task.upper_loss, task.lower_loss)
            with torch.no_grad():
                for parameter, value in zip(task.heads.parameters(), start, strict=True):
                    parameter.copy_(value)
            self._is_known = True
        task.begin(images, keep_heads=self.warm)
        if not self.warm:
            self.optimizer.restart_lower()
        with task.held():
            for _ in range(self.steps):
                self.optimizer.lower_step(task.upper_loss, task.lower_loss)
        self.lower_steps[0] += self.steps
        self.optimizer.upper_step(task.upper_loss, task.lower_loss)


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
        device = _device(self.encoder)
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
        device = _device(self.encoder)
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


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _step(rule: Optimizer, loss: Tensor) -> None:
    rule.zero_grad()
    loss.backward()
    rule.step()
