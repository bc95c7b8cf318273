"""The published encoders: four convolutions, and a residual network.

Batch normalisation as in the published code: a shift, no scale. Where its statistics come from is
said from outside, by ``normalised_by``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, leaky_relu, max_pool2d, relu

Statistics: TypeAlias = Literal["batch", "running"] | int
"""Of the images at hand, of those seen in training, or of the first so many at hand."""

MOMENTUM, EPSILON = 0.1, 1e-3


class Shift(nn.Module):
    """Batch normalisation with a shift per channel and no scale.

    In training mode the statistics are those of the batch, and the running ones follow them.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.statistics: Statistics = "running"
        """In evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + EPSILON) + bias, of images (n, channels, height, width)."""
        if self.training or self.statistics == "running":
            momentum = MOMENTUM
            if self.training:
                self.batches += 1
                momentum = max(momentum, 1 / int(self.batches))  # the mean of the first ones
            held = self.running_mean, self.running_var
            return batch_norm(x, *held, None, self.bias, self.training, momentum, EPSILON)
        if self.statistics == "batch":
            # Without a scale torch's second derivative fails.
            scale = torch.ones_like(self.bias)
            return batch_norm(x, None, None, scale, self.bias, True, 0.0, EPSILON)
        var, mean = torch.var_mean(x[: self.statistics], (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * (var + EPSILON).rsqrt() + self.bias[:, None, None]


@contextlib.contextmanager
def normalised_by(encoder: nn.Module, statistics: Statistics) -> Generator[None]:
    """Inside, ``encoder`` is in evaluation mode with these statistics; then in training mode."""
    encoder.eval()
    for part in encoder.modules():
        if isinstance(part, Shift):
            part.statistics = statistics
    try:
        yield
    finally:
        encoder.train()


def _convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=size == 1)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Conv4(nn.Module):
    """Four times convolution 3 x 3, ``Shift``, ReLU (not in the last), halving.

    Of 28 x 28 pixels ``width`` features, of 84 x 84 25 times as many.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        inputs = (channels, width, width, width)
        self.convolutions = nn.ModuleList(_convolution(n, width, 3) for n in inputs)
        self.shifts = nn.ModuleList(Shift(width) for _ in inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, features)."""
        for number, (convolution, shift) in enumerate(
            zip(self.convolutions, self.shifts, strict=True)
        ):
            x = max_pool2d(shift(convolution(x)), 2)
            x = relu(x) if number < 3 else x  # after the maximum as before it, on a quarter
        return x.flatten(1)


class Residual(nn.Module):
    """x' = halved(convolution 1 x 1 of x + three convolutions 3 x 3 with ``Shift``, leaky ReLU)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = _convolution(inputs, outputs, 1)
        widths = (inputs, outputs, outputs)
        self.convolutions = nn.ModuleList(_convolution(n, outputs, 3) for n in widths)
        self.shifts = nn.ModuleList(Shift(outputs) for _ in widths)

    def forward(self, x: Tensor) -> Tensor:
        """(n, outputs, height / 2, width / 2), rounded up."""
        y = x
        for convolution, shift in zip(self.convolutions, self.shifts, strict=True):
            y = leaky_relu(shift(convolution(y)), 0.1)
        return max_pool2d(self.skip(x) + y, 2, ceil_mode=True)


class ResNet(nn.Module):
    """Four residual blocks, 2,048 and 384 channels at single places; 384 features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 64, 96, 128, 256)
        self.blocks = nn.Sequential(*(Residual(*pair) for pair in itertools.pairwise(widths)))
        self.wide, self.last = _convolution(256, 2048, 1), _convolution(2048, 384, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 384)."""
        x = relu(self.wide(self.blocks(x)))
        return self.last(avg_pool2d(x, x.shape[-2:])).flatten(1)
