"""Hugging Face Accelerate: its wrapper passes ``step((f, g))`` on; plain steps are the optimizer's.

    python -m examples.trainers.with_accelerate

u: a weight per source of text. v: a small transformer. Model, weights, optimizer and loader are
prepared as in any script; nothing calls ``accelerator.backward``.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from examples.mix_sources.formulation import letter_losses
from examples.mix_sources.transformer import Size, Transformer
from examples.trainers.data import LENGTH, NAMES, loader
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SourceWeights


def main(steps: int = 120, cpu: bool = False) -> Tensor:
    """Train; the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=cpu)
    model, weights = (
        Transformer(Size(width=32, layers=1, context=LENGTH)),
        SourceWeights(len(NAMES)),
    )
    optimizer = PenaltyBilevelOptimizer(
        weights.parameters(),
        model.parameters(),
        upper_lr=0.1,
        lower_lr=3e-3,
        curvature="finite_difference",  # fused attention has no second derivative
    )
    batches = loader(steps)
    model, weights, optimizer, batches = accelerator.prepare(model, weights, optimizer, batches)
    for step, (sources, clean) in enumerate(batches):

        def upper(clean: Tensor = clean) -> Tensor:
            return letter_losses(model, clean).mean()

        def lower(sources: Tensor = sources) -> Tensor:
            each = torch.stack([letter_losses(model, s).mean() for s in sources.unbind(1)])
            return weights() @ each

        if step % 4 < 3:
            optimizer.optimizer.plain_lower_step(lower)
        else:
            optimizer.step((upper, lower))
    return weights().detach()


if __name__ == "__main__":
    for name, weight in zip(NAMES, main().tolist(), strict=True):
        print(f"{name}: {weight:.3f}")
