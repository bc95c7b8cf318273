"""What all that learns an encoder has in common: a step, and scores for new tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.few_shot.embedded import embedded
from examples.few_shot.encoders import Statistics
from examples.few_shot.formulation import Features
from examples.few_shot.problem import Images, Size, Tasks


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


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next(module.parameters()).device
