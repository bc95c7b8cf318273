"""A head per task, fitted from zero to the end of g; all tasks of a test at once."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.few_shot.formulation import penalty_of
from examples.shared.episodes import class_by_class, mean_cross_entropy
from torch_penalty_bilevel.nn import StackedHeads

TOLERANCE, MOST = 1e-4, 5000
COSINE_STEPS, COSINE_RATE = 300, 1e-2  # of Adam; published: 100 with 1e-3, on loose features


def longer(features: Tensor) -> Tensor:
    """With an entry 1, for the bias."""
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)


@torch.no_grad()
def fitted(support: Tensor, ways: int, decay: float) -> Tensor:
    """The heads (tasks, ways, features + 1) at the minimum of g.

        g = mean cross entropy of the support images + decay ||v||^2 / 2

    up to ``TOLERANCE`` of the first gradient, in the worst task.

    v = A' X with X the images' features, so A (tasks, n, ways) is looked for; the gradient is
    G' X, G = (softmax(K A) - Y) / n + decay A with K = X X'. A step A <- A - (K / 2n + decay)^-1 G
    moves v by -G' X B^-1 (``head_curvature.py``). With Nesterov's momentum, which starts anew where
    it leads uphill.

    Args:
        support: features, (tasks, n, features), class by class.
        ways: classes.
        decay: of g.

    Raises:
        ArithmeticError: not there after ``MOST`` steps.
    """
    x = longer(support.double())  # in single precision the end would be out of reach
    tasks, count, _ = x.shape
    kernel = x @ x.mT
    wanted = torch.eye(ways).to(x)[class_by_class(ways, count // ways)]
    identity = torch.eye(count).to(x)
    inverse = torch.linalg.inv(kernel / (2 * count) + decay * identity)
    values = ahead = kernel.new_zeros(tasks, count, ways)
    age = kernel.new_ones(tasks, 1, 1)
    first = size = kernel.new_zeros(tasks)
    for number in range(MOST):
        gradient = ((kernel @ ahead).softmax(-1) - wanted) / count + decay * ahead
        size = (gradient * (kernel @ gradient)).sum((1, 2)).clamp(min=0).sqrt()
        first = torch.maximum(first, size) if number == 0 else first
        if bool((size <= TOLERANCE * first).all()):
            return (ahead.mT @ x).to(support.dtype)
        moved = ahead - inverse @ gradient
        step = moved - values
        uphill = (gradient * (kernel @ step)).sum((1, 2), keepdim=True) > 0
        age = torch.where(uphill, 1.0, age)
        older = (1 + (1 + 4 * age.square()).sqrt()) / 2
        ahead, values, age = moved + (age - 1) / older * step, moved, older
    worst = float((size / first).max())
    raise ArithmeticError(f"heads of {tasks} tasks: after {MOST} steps the gradient is at {worst}")


def fitted_cosine(support: Tensor, ways: int, decay: float) -> StackedHeads:
    """Cosine heads, whose g is not convex, by Adam from small random rows."""
    tasks, _, width = support.shape
    with torch.random.fork_rng():  # a test changes nothing that comes after it
        torch.manual_seed(0)
        heads = StackedHeads(tasks, width, ways, cosine=True, device=support.device)
    rule = torch.optim.Adam(heads.parameters(), lr=COSINE_RATE)
    for _ in range(COSINE_STEPS):
        rule.zero_grad()
        loss = tasks * mean_cross_entropy(heads(support), ways) + penalty_of(heads, decay)
        loss.backward()
        rule.step()
    return heads
