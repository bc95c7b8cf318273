"""``BilevelTrainer`` on one process or, under torchrun, several; rank 0 saves what was learned."""

import sys

import torch
from hugging_face import Rows, gpt2, trainer

STEPS, ROWS = 4, 4


def learned(folder, world):
    """With ``ROWS`` rows per step in all, in float64."""
    torch.set_default_dtype(torch.float64)
    run = trainer(
        folder,
        model=gpt2(dropout=0.0),
        data=Rows(16),
        clean=Rows(8, sources=1, seed=1),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world,
        train_sampling_strategy="sequential",
    )
    run.train()
    return {
        "u": run.upper.logits.detach(),
        "v": torch.cat([p.detach().flatten() for p in run.model.parameters()]),
        "loss": torch.tensor([logs["loss"] for logs in run.state.log_history if "loss" in logs]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = learned(sys.argv[1], world=2)
    if torch.distributed.get_rank() == 0:
        torch.save(found, f"{sys.argv[1]}/learned.pt")
    torch.distributed.destroy_process_group()
