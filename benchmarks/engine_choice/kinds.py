"""Kinds of network on 8 x 8 images, for comparing engines: with and without kinks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class _Rows(nn.Module):
    """The image as a sequence of its rows, through a recurrent or attention layer."""

    def __init__(self, layer: nn.Module, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, wide_in), layer
        self.last = nn.Linear(wide_out, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.first(x.squeeze(1)))
        return self.last((out[0] if isinstance(out, tuple) else out).mean(1))


def _mlp(*between: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64),
        *(make() for make in between),
        nn.Linear(64, 64),
        *(make() for make in between),
        nn.Linear(64, 10),
    )


def _normed(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return _mlp(lambda: nn.BatchNorm1d(64), activation)


def _conv(norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        norm(16),
        activation(),
        nn.MaxPool2d(2) if activation is nn.ReLU else nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        norm(32),
        activation(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


def _residual() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        _Residual(16),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def _attention(activation: str) -> _Rows:
    # No dropout: with it torch takes the plain formula, which has a second derivative.
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, activation, batch_first=True)
    return _Rows(layer, 32, 32)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "conv-BatchNorm-ReLU-pool": lambda: _conv(nn.BatchNorm2d, nn.ReLU),
    "conv-GroupNorm-SiLU": lambda: _conv(lambda width: nn.GroupNorm(4, width), nn.SiLU),
    "MLP-LayerNorm-ReLU": lambda: _mlp(lambda: nn.LayerNorm(64), nn.ReLU),
    "MLP-BatchNorm-ReLU": lambda: _normed(nn.ReLU),
    "MLP-BatchNorm-LeakyReLU": lambda: _normed(nn.LeakyReLU),
    "MLP-BatchNorm-ELU": lambda: _normed(nn.ELU),
    "MLP-BatchNorm-hardswish": lambda: _normed(nn.Hardswish),
    "MLP-LayerNorm-GELU": lambda: _mlp(lambda: nn.LayerNorm(64), nn.GELU),
    "residual-BatchNorm-ReLU": _residual,
    "LSTM": lambda: _Rows(nn.LSTM(32, 32, batch_first=True), 32, 32),
    "attention-ReLU": lambda: _attention("relu"),
    "attention-GELU": lambda: _attention("gelu"),
}


def twice_differentiable(kind: str) -> contextlib.AbstractContextManager[None]:
    """Where double backward of this kind exists: attention by its plain formula."""
    plain = "attention" in kind
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
