"""Learners whose heads are the lower level: the penalty method, and implicit differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.few_shot.fitted import COSINE_RATE, fitted, fitted_cosine, longer
from examples.few_shot.formulation import Features, FewShot, meta_step, penalty_optimizer
from examples.few_shot.learner import Learner, Setting, device_of
from examples.few_shot.problem import Images
from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import StackedHeads


class Bilevel(Learner):
    """Heads are the lower level; a new task's is fitted from zero to the end."""

    optimizer: Any
    """Of both levels."""

    def __init__(self, setting: Setting, decay: float) -> None:
        super().__init__(setting)
        encoder, width, size, tasks, cosine = setting
        heads = StackedHeads(tasks, width, size.ways, cosine=cosine, device=device_of(encoder))
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
        self, setting: Setting, lr: float, decay: float, tolerance: float = 0.2, most: int = 100
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
