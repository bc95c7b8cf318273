"""Problems of the speed benchmarks: one weight per training sample, networks of several kinds.

f is the mean loss of a batch of trusted samples, g the mean of sigmoid(u_i) times the loss of
sample i over a batch of others. The data are random: they decide nothing about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

CLASSES = 10
SAMPLES = 1000
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Two losses of a model; ``values`` stand in for its parameters, ``scores`` for u's rows."""

    model: nn.Module
    weights: nn.Embedding
    upper_batch: tuple[Tensor, Tensor]
    lower_batch: tuple[Tensor, Tensor, Tensor]

    @property
    def upper(self) -> Tensor:
        """u, one logit per sample."""
        return self.weights.weight

    @property
    def lower(self) -> list[Tensor]:
        """The model's parameters v."""
        return list(self.model.parameters())

    @property
    def data(self) -> list[Tensor]:
        """All tensors that exist whatever the method."""
        return [self.upper, *self.lower, *self.upper_batch, *self.lower_batch]

    def f(self, values: Values | None = None) -> Tensor:
        inputs, labels = self.upper_batch
        return cross_entropy(self._outputs(inputs, values), labels)

    def g(self, values: Values | None = None, scores: Tensor | None = None) -> Tensor:
        inputs, labels, rows = self.lower_batch
        scores = self.weights(rows)[:, 0] if scores is None else scores
        losses = cross_entropy(self._outputs(inputs, values), labels, reduction="none")
        return (scores.sigmoid() * losses).mean()

    def redraw(self) -> None:
        """Other samples, in place."""
        (upper, labels), (lower, more, rows) = self.upper_batch, self.lower_batch
        rows.random_(len(self.upper))
        labels.random_(CLASSES)
        more.random_(CLASSES)
        for inputs in (upper, lower):
            if inputs.is_floating_point():
                inputs.normal_()
            else:
                inputs.random_(Transformer.VOCABULARY)

    def _outputs(self, inputs: Tensor, values: Values | None) -> Tensor:
        if values is None:
            return self.model(inputs)
        return torch.func.functional_call(self.model, dict(values), (inputs,))


def weighted(
    model: nn.Module,
    sample: Callable[[int], Tensor],
    batch: int,
    samples: int = SAMPLES,
    sparse: bool = False,
) -> Problem:
    """``model`` with one weight for each of ``samples`` samples, of which g sees ``batch``."""

    def drawn() -> tuple[Tensor, Tensor]:
        return sample(batch), torch.randint(0, CLASSES, (batch,))

    weights = nn.Embedding(samples, 1, sparse=sparse)
    nn.init.zeros_(weights.weight)
    return Problem(model, weights, drawn(), (*drawn(), torch.randint(0, samples, (batch,))))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them, down to the classes."""
    layers: list[nn.Module] = []
    for inward, outward in zip(widths, (*widths[1:], CLASSES), strict=True):
        layers += [nn.Linear(inward, outward), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def vectors(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, width)


def sequences(length: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, Transformer.VOCABULARY, (batch, length))


class Transformer(nn.Module):
    """Two encoder layers with torch's default attention, or its MATH backend, and mean pooling."""

    VOCABULARY = 100

    def __init__(self, width: int = 64, length: int = 32, math: bool = False) -> None:
        super().__init__()
        self.math = math
        self.tokens = nn.Embedding(self.VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.tokens(tokens) + self.places
        if self.math:
            with sdpa_kernel(SDPBackend.MATH):
                return self.head(self.encoder(embedded).mean(1))
        return self.head(self.encoder(embedded).mean(1))


class Recurrent(nn.Module):
    """An LSTM over embedded tokens and a linear layer on its last state."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(Transformer.VOCABULARY, width)
        self.cell = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cell(self.tokens(tokens))[0][:, -1])


def convolutional(channels: int = 32) -> nn.Sequential:
    """Three convolutions with GroupNorm and SiLU, mean pooling."""
    layers: list[nn.Module] = []
    for inward, stride in ((3, 1), (channels, 2), (channels, 2)):
        layers += [
            nn.Conv2d(inward, channels, 3, stride=stride, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
        ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return nn.Sequential(*layers, *head)


BY_KIND: dict[str, Callable[[], Problem]] = {
    "MLP 64-16-10": lambda: weighted(mlp(64, 16), vectors(64), 64),
    "MLP 784-1024-1024-10": lambda: weighted(mlp(784, 1024, 1024), vectors(784), 64),
    "CNN, GroupNorm": lambda: weighted(
        convolutional(), lambda batch: torch.randn(batch, 3, 16, 16), 64
    ),
    "transformer": lambda: weighted(Transformer(), sequences(32), 32),
    "transformer, MATH attention": lambda: weighted(Transformer(math=True), sequences(32), 32),
    "LSTM": lambda: weighted(Recurrent(), sequences(32), 32),
}


def by_kind(kind: str) -> Problem:
    """A fresh problem, the same in every call."""
    torch.manual_seed(0)
    return BY_KIND[kind]()


def by_size(parameters: float, batch: int = 16, samples: int = 1000) -> Problem:
    """An MLP h-h-10 of about this many parameters, the same in every call."""
    torch.manual_seed(0)
    width = round((parameters + 36) ** 0.5 - 6)
    return weighted(mlp(width, width), vectors(width), batch, samples)


def by_samples(samples: int, sparse: bool) -> Problem:
    """The smallest MLP with this many weights, whose gradient is dense or sparse."""
    torch.manual_seed(0)
    return weighted(mlp(64, 16), vectors(64), 64, samples, sparse)
