"""The matching defence: ``denoise`` on the poisoned set, from images that can be trusted.

    min over a of    f(v) = CE(v; trusted)
    where v minimises g(a, v) = sum_i w_i CE_i(v) / sum_i w_i + decay ||W||^2,  w = sigmoid(a)

over the poisoned training set; then a victim is trained from scratch with the weights w.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.poison.attack import Attack, TrainingSet
from examples.shared.record import Line
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SampleWeights

STEPS = 300
RATES = 0.3, 1e-2  # upper, lower; of 0.1, 0.3, 1 and 3e-3, 1e-2 by the victims of seed 100


def learned_weights(task: Attack, training: TrainingSet, steps: int = STEPS) -> Tensor:
    """One weight in (0, 1) per training sample."""
    (inputs, labels), trusted = training.samples, task.data.trusted
    model = task.model(inputs)
    with torch.no_grad():
        for p, value in zip(model.parameters(), task.victim(training), strict=True):
            p.copy_(value)
    weights = SampleWeights(len(labels), dtype=inputs.dtype, device=labels.device)
    optimizer = PenaltyBilevelOptimizer(
        weights.parameters(), model.parameters(), upper_lr=RATES[0], lower_lr=RATES[1]
    )

    def upper_loss() -> Tensor:
        return cross_entropy(model(trusted.inputs), trusted.labels)

    def lower_loss() -> Tensor:
        losses = cross_entropy(model(inputs), labels, reduction="none")
        return weights.weighted_mean(losses) + task.decay * model.weight.square().sum()

    for _ in range(steps):
        optimizer.step(upper_loss, lower_loss)
    return weights().detach()


def defended(task: Attack, training: TrainingSet, steps: int = STEPS) -> Line:
    """What the attack does to a victim that is trained with the weights."""
    weights = learned_weights(task, training, steps)
    scores = task.score(task.victim(training, weights))
    found = {f"defended_{name}": value for name, value in scores.items()}
    for name, chosen in (("poison", training.is_poison), ("clean", ~training.is_poison)):
        if chosen.any():
            found[f"{name}_weight"] = weights[chosen].mean().item()
    return found
