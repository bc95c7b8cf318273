"""The bilevel problem of ``few_shot``.

    min over u of  f(u, v) = mean over tasks t of  CE of head v_t on phi_u(query images of t)
    where v minimises  g(u, v) = mean over t of ( CE of v_t on phi_u(support images of t)
                                                  + DECAY ||v_t||^2 / 2 )

CE is the mean cross entropy, phi_u the encoder, v_t = (W_t, b_t) a linear head. As published, but
for the decay: without it linear heads have no minimiser where classes can be separated. A cosine
head does not see how long the rows of (W, b) are; of those (||row||^2 - 1)^2 takes the place of
||row||^2.

Every u-step brings new tasks, v = 0 (a cosine: small random rows). phi is computed once for it:
while v moves and u does not, the heads read the features as numbers, and what a lower step costs
is a product of small matrices. So v is not moved five times but until the certificate

    ||grad_v f + H q|| / ||grad_v f||  and  ||grad_v g|| / (what it was at the start)

says that both v and the multiplier q are solved; then u moves, through the same features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

from torch import Tensor, nn

from examples.few_shot.head_curvature import HeadCurvature, HeadSteps
from examples.few_shot.problem import Images
from examples.shared.episodes import mean_cross_entropy
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.multipliers import LeastSquares
from torch_penalty_bilevel.nn import StackedHeads
from torch_penalty_bilevel.penalties import Stationarity


class Features(NamedTuple):
    """Phi of a meta-batch, (tasks, images, features)."""

    support: Tensor
    query: Tensor

    def numbers(self) -> Features:
        """Without what they were computed from."""
        return Features(self.support.detach(), self.query.detach())


def features_of(encoder: nn.Module, images: Images, tasks: int) -> Features:
    """Phi; batch statistics are those of all support images, or of all query images."""
    return Features(*(encoder(part).unflatten(0, (tasks, -1)) for part in images))


class FewShot:
    """Both losses on the tasks at hand.

    Args:
        encoder: phi.
        heads: v, of a meta-batch.
        decay: DECAY.
    """

    features: Features

    def __init__(self, encoder: nn.Module, heads: StackedHeads, decay: float) -> None:
        self.encoder, self.heads, self.decay = encoder, heads, decay
        self.tasks, self.ways, _ = heads.weight.shape
        self.curvature = HeadCurvature(decay)
        self.begin_heads()

    def begin(self, images: Images, keep_heads: bool = False) -> None:
        """New tasks: phi of their images, and heads at their start (unless they are kept)."""
        self.features = features_of(self.encoder, images, self.tasks)
        self.curvature.at(self.features.support.detach())
        if not keep_heads:
            self.begin_heads()

    def begin_heads(self) -> None:
        """V = 0, or random rows."""
        self.heads.reset()
        if not self.heads.cosine:
            for parameter in self.heads.parameters():
                nn.init.zeros_(parameter)

    def upper_loss(self) -> Tensor:
        """F."""
        return mean_cross_entropy(self.heads(self.features.query), self.ways)

    def lower_loss(self) -> Tensor:
        """G."""
        loss = mean_cross_entropy(self.heads(self.features.support), self.ways)
        return loss + penalty_of(self.heads, self.decay) / self.tasks

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """Inside, u does not move: the losses are constant in it."""
        whole, self.features = self.features, self.features.numbers()
        try:
            yield
        finally:
            self.features = whole


def penalty_of(heads: StackedHeads, decay: float) -> Tensor:
    """What g has beside the cross entropy, summed over tasks, 0-d."""
    assert heads.bias is not None
    rows = heads.weight.square().sum(2) + heads.bias.square()
    return decay / 2 * ((rows - 1).square() if heads.cosine else rows).sum()


def penalty_optimizer(task: FewShot, upper_lr: float) -> PenaltyBilevelOptimizer:
    """U by Adam; v and the multiplier in units of the heads' curvature (``head_curvature.py``).

    The lower problem has one solution, so f needs no say in which it is: ``share=0``.
    """
    return PenaltyBilevelOptimizer(
        task.encoder.parameters(),
        HeadSteps(task.heads.parameters(), task.curvature),
        upper_lr=upper_lr,
        penalty=Stationarity(LeastSquares(share=0.0, preconditioner=task.curvature.power)),
        curvature="double_backward",
        allow_unused=True,  # lower steps do not see u
    )


def meta_step(
    task: FewShot, optimizer: PenaltyBilevelOptimizer, images: Images, tolerance: float, most: int
) -> int:
    """New tasks, lower steps on held features until v and q are solved, one u-step.

    Args:
        task: the losses.
        optimizer: of both levels.
        images: of the new tasks.
        tolerance: of the certificate, and of ||grad_v g|| by what it was at the start.
        most: lower steps at most; with ``tolerance=0`` their number.

    Returns:
        The number of lower steps.
    """
    task.begin(images)
    optimizer.restart_lower()
    first: Tensor | None = None
    taken = 0
    # The very first evaluation looks at what the losses depend on.
    is_known = optimizer.metrics.gradient_evaluations > 0
    with task.held() if is_known else contextlib.nullcontext():
        while taken < most:
            optimizer.lower_step(task.upper_loss, task.lower_loss)
            taken += 1
            seen = optimizer.metrics
            first = seen.residual_norm if first is None else first
            if seen.relative_certificate <= tolerance and seen.residual_norm <= tolerance * first:
                break
    optimizer.upper_step(task.upper_loss, task.lower_loss)
    return taken
