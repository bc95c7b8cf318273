"""``BilevelTrainer`` with a small random GPT-2 on two sources of tokens."""

import torch
import transformers
from torch.utils.data import Dataset

from torch_penalty_bilevel.integrations.transformers import BilevelTrainer
from torch_penalty_bilevel.nn import SourceWeights

TOKENS, LENGTH = 11, 6
DIFFERENCES = {"curvature": "finite_difference"}  # fused attention has no second derivative


class Rows(Dataset):
    """Counting up (source 0) or random (source 1), modulo ``TOKENS``; labels are the tokens."""

    def __init__(self, count, sources=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(TOKENS, (count, 1), generator=generator)
        noise = torch.randint(TOKENS, (count, LENGTH), generator=generator)
        self.source = torch.arange(count) % sources
        up = (first + torch.arange(LENGTH)) % TOKENS
        self.tokens = torch.where(self.source[:, None] == 0, up, noise)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        tokens = self.tokens[i]
        return {"input_ids": tokens, "labels": tokens, "source": self.source[i]}


def gpt2(dropout=0.1):
    torch.manual_seed(0)
    size = {"vocab_size": TOKENS, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**size, **ends, **dict.fromkeys(names, dropout))
    return transformers.GPT2LMHeadModel(config)


def upper_loss(model, inputs):
    return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def lower_loss(model, weights, inputs):
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:], reduction="none")
    return (2 * weights()[inputs["source"]] * each.mean(1)).mean()


class Mixer(BilevelTrainer):
    def compute_upper_loss(self, model, inputs):
        return upper_loss(model, inputs)

    def compute_lower_loss(self, model, inputs):
        return lower_loss(model, self.upper, inputs)


def trainer(folder, kind=Mixer, model=None, upper=None, data=None, clean=None, **options):
    mine = ("upper_lr", "upper_every", "optimizer_options", "optimizers", "model_init")
    mine += ("eval_dataset",)
    bilevel = {"optimizer_options": DIFFERENCES, "upper_lr": 0.05}
    bilevel |= {name: options.pop(name) for name in mine if name in options}
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "optim": "adamw_torch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return kind(
        None if "model_init" in bilevel else model or gpt2(),
        transformers.TrainingArguments(str(folder), **(arguments | options)),
        train_dataset=data or Rows(18),
        upper=SourceWeights(2) if upper is None else upper,
        upper_dataset=clean or Rows(10, sources=1, seed=1),
        **bilevel,
    )
