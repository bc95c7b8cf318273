"""Lightning, in its manual mode: the module holds both levels and steps by itself.

    python -m examples.trainers.with_lightning

u: a weight per source of text. v: a small transformer. Lightning counts the calls of ``step`` on
what ``self.optimizers()`` returns; plain steps are those of the optimizer inside.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from examples.mix_sources.formulation import letter_losses
from examples.mix_sources.transformer import Size, Transformer
from examples.trainers.data import LENGTH, NAMES, loader
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.integrations.lightning import BilevelCallback
from torch_penalty_bilevel.nn import SourceWeights


class Mixer(lightning.LightningModule):
    """Both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = Transformer(Size(width=32, layers=1, context=LENGTH))
        self.weights = SourceWeights(len(NAMES))

    def configure_optimizers(self) -> PenaltyBilevelOptimizer:
        """Of both levels."""
        return PenaltyBilevelOptimizer(
            self.weights.parameters(),
            self.model.parameters(),
            upper_lr=0.1,
            lower_lr=3e-3,
            curvature="finite_difference",  # fused attention has no second derivative
        )

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        """Every fourth moves u."""
        sources, clean = batch
        optimizer = self.optimizers()

        def upper() -> Tensor:
            return letter_losses(self.model, clean).mean()

        def lower() -> Tensor:
            each = torch.stack([letter_losses(self.model, s).mean() for s in sources.unbind(1)])
            return self.weights() @ each

        if number % 4 < 3:
            optimizer.optimizer.plain_lower_step(lower)
        else:
            optimizer.step(closure=upper, lower_closure=lower)


def main(steps: int = 120, accelerator: str = "auto") -> Tensor:
    """Train; the weights."""
    lightning.seed_everything(0, verbose=False)
    mixer = Mixer()
    trainer = lightning.Trainer(
        accelerator=accelerator,
        max_epochs=1,
        callbacks=[BilevelCallback()],  # the certificate in the progress bar
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(mixer, loader(steps))
    return mixer.weights().detach()


if __name__ == "__main__":
    for name, weight in zip(NAMES, main().tolist(), strict=True):
        print(f"{name}: {weight:.3f}")
