"""Hugging Face peft: v are LoRA's few numbers, the model around them stays as it is.

    python -m examples.trainers.with_peft

u: a weight per source of text. Multiplier and products have the size of the adapters, so that the
bilevel step needs little memory beside a large model.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from examples.trainers.data import LENGTH, NAMES, TOKENS, loader
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SourceWeights


def main(steps: int = 120) -> Tensor:
    """Train; the weights."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    size = {"vocab_size": TOKENS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 1, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**size, **ends))  # or .from_pretrained(...)
    parts = ["c_attn", "c_fc", "c_proj", "wte"]
    model = get_peft_model(base, LoraConfig(r=8, target_modules=parts, fan_in_fan_out=True))
    weights = SourceWeights(len(NAMES))
    optimizer = PenaltyBilevelOptimizer(
        weights.parameters(),
        [p for p in model.parameters() if p.requires_grad],
        upper_lr=0.1,
        lower_lr=1e-2,
        curvature="finite_difference",  # fused attention has no second derivative
    )
    for step, (sources, clean) in enumerate(loader(steps)):

        def loss(tokens: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=tokens).loss

        def upper(clean: Tensor = clean) -> Tensor:
            return loss(clean)

        def lower(sources: Tensor = sources) -> Tensor:
            return weights() @ torch.stack([loss(tokens) for tokens in sources.unbind(1)])

        if step % 4 < 3:
            optimizer.plain_lower_step(lower)
        else:
            optimizer.step(upper, lower)
    return weights().detach()


if __name__ == "__main__":
    for name, weight in zip(NAMES, main().tolist(), strict=True):
        print(f"{name}: {weight:.3f}")
