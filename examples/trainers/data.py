"""What the scripts of this folder train on: put your own in its place.

Three sources of token sequences: one counts up, one counts down, one is random; all modulo
``TOKENS``. The clean set counts up.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

TOKENS, LENGTH, BATCH = 16, 12, 16
NAMES = ("up", "down", "random")


def loader(batches: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of (sources (n, 3, LENGTH), clean (n, LENGTH)), int64."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(TOKENS, (batches * BATCH, 4, 1), generator=generator)
    places = torch.arange(LENGTH)
    up, down, _, clean = first.unbind(1)
    noise = torch.randint(TOKENS, (batches * BATCH, LENGTH), generator=generator)
    sources = torch.stack([(up + places) % TOKENS, (down - places) % TOKENS, noise], dim=1)
    return DataLoader(TensorDataset(sources, (clean + places) % TOKENS), batch_size=BATCH)
