"""Hugging Face's Trainer: its arguments, schedules, logs and checkpoints, with an upper level.

    python -m examples.trainers.with_trainer

u: a weight per source of text. v: all parameters of the model. Every fourth step moves u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from examples.trainers.data import BATCH, LENGTH, NAMES, TOKENS, loader
from torch_penalty_bilevel.integrations.transformers import BilevelTrainer
from torch_penalty_bilevel.nn import SourceWeights


class Mixer(BilevelTrainer):
    """The losses; batches of ``train_dataset`` have (n, sources, LENGTH) tokens."""

    def compute_upper_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """On clean text."""
        return model(input_ids=inputs["tokens"], labels=inputs["tokens"]).loss

    def compute_lower_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """On the sources."""
        sources = inputs["tokens"].unbind(1)
        return self.upper() @ torch.stack([model(input_ids=s, labels=s).loss for s in sources])


def main(steps: int = 120, folder: str = "results/with_trainer", cpu: bool = False) -> Tensor:
    """Train; the weights."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    size = {"vocab_size": TOKENS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 1, "n_head": 2}
    sources, clean = loader(steps).dataset.tensors
    trainer = Mixer(
        GPT2LMHeadModel(GPT2Config(**size, **ends)),  # or .from_pretrained(...)
        TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=20,
            report_to="none",  # or "tensorboard", "wandb": the certificate is in the log
            remove_unused_columns=False,
            use_cpu=cpu,
        ),
        data_collator=lambda rows: {"tokens": torch.stack([row for (row,) in rows])},
        train_dataset=TensorDataset(sources),
        upper=SourceWeights(len(NAMES)),
        upper_dataset=TensorDataset(clean),
        upper_lr=0.1,
        upper_every=4,
        optimizer_options={"curvature": "finite_difference"},  # fused attention
    )
    trainer.train()
    return trainer.upper().detach()


if __name__ == "__main__":
    for name, weight in zip(NAMES, main().tolist(), strict=True):
        print(f"{name}: {weight:.3f}")
