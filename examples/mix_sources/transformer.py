"""A small causal transformer over letters, with torch's own attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from examples.mix_sources.text import ALPHABET


class Size(NamedTuple):
    """Of the transformer: numbers per letter, layers, letters it looks back at."""

    width: int
    layers: int
    context: int


class Block(nn.Module):
    """Attention and a network of one hidden layer, each added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.pieces = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, letters, width) to the same."""
        pieces = self.pieces(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = pieces.permute(2, 0, 3, 1, 4)  # each (n, heads, letters, width / heads)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).flatten(-2))
        return x + self.network(self.norms[1](x))


class Transformer(nn.Module):
    """Scores of the next letter, (n, letters, alphabet), from letters (n, letters)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(ALPHABET), size.width)
        self.places = nn.Embedding(size.context, size.width)
        heads = max(1, size.width // 32)
        self.blocks = nn.Sequential(*(Block(size.width, heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for table in (self.letters, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, letters: Tensor) -> Tensor:
        """The embedding of letters also reads them out."""
        places = torch.arange(letters.shape[1], device=letters.device)
        x = self.blocks(self.letters(letters) + self.places(places))
        return self.norm(x) @ self.letters.weight.T


def make_transformer(size: Size, seed: int) -> Transformer:
    """With the first parameters of a seed; the global random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(size)
