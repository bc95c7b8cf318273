"""torchmetrics: accuracy on the clean text, and the certificate averaged between two readings.

    python -m examples.trainers.with_torchmetrics

u: a weight per source of text. v: a small transformer. Metrics are updated outside of the closures,
which an optimizer with finite differences calls several times per step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from examples.mix_sources.formulation import letter_losses
from examples.mix_sources.text import ALPHABET
from examples.mix_sources.transformer import Size, Transformer
from examples.trainers.data import LENGTH, NAMES, loader
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SourceWeights


def main(steps: int = 120, every: int = 40) -> list[tuple[float, float]]:
    """Train; (accuracy of the next token before the step, certificate) of every ``every`` steps."""
    torch.manual_seed(0)
    model = Transformer(Size(width=32, layers=1, context=LENGTH))
    weights = SourceWeights(len(NAMES))
    optimizer = PenaltyBilevelOptimizer(
        weights.parameters(),
        model.parameters(),
        upper_lr=0.1,
        lower_lr=3e-3,
        curvature="finite_difference",  # fused attention has no second derivative
    )
    accuracy, certificate = MulticlassAccuracy(len(ALPHABET), average="micro"), MeanMetric()
    readings: list[tuple[float, float]] = []
    for step, (sources, clean) in enumerate(loader(steps)):

        def upper(clean: Tensor = clean) -> Tensor:
            return letter_losses(model, clean).mean()

        def lower(sources: Tensor = sources) -> Tensor:
            each = torch.stack([letter_losses(model, s).mean() for s in sources.unbind(1)])
            return weights() @ each

        with torch.no_grad():
            accuracy.update(model(clean[:, :-1]).flatten(0, 1), clean[:, 1:].flatten())
        optimizer.step(upper, lower)
        certificate.update(optimizer.metrics.relative_certificate)
        if (step + 1) % every == 0:
            readings.append((float(accuracy.compute()), float(certificate.compute())))
            accuracy.reset()
            certificate.reset()
    return readings


if __name__ == "__main__":
    for reading in main():
        print("accuracy {:.3f}, relative certificate {:.3f}".format(*reading))
