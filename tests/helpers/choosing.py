"""Small networks whose double backward is cheap, dear or at odds with a difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import Automatic


def normalised(seed: int = 0) -> nn.Sequential:
    """LayerNorm and GELU, whose derivatives torch takes apart when it differentiates twice."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3))


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))


class Zigzag(nn.Module):
    """Slope 1 or -1, changing every thousandth: no difference sees the second derivative 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.remainder(2e-3) - 1e-3).abs() + x


def kinked(seed: int = 0) -> nn.Sequential:
    return normalised(seed).insert(3, Zigzag())


class Task:
    """One weight per sample of a small classifier."""

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float32, **options) -> None:
        self.net = net.to(dtype)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(24, 8, generator=generator, dtype=dtype)
        self.y = torch.randint(3, (24,), generator=generator)
        self.scores = torch.zeros(24, dtype=dtype, requires_grad=True)
        self.lower_calls = 0
        self.optimizer = PenaltyBilevelOptimizer([self.scores], self.net.parameters(), **options)

    def f(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x.flip(0)), self.y.flip(0))

    def g(self) -> Tensor:
        self.lower_calls += 1
        losses = nn.functional.cross_entropy(self.net(self.x), self.y, reduction="none")
        return (self.scores.sigmoid() * losses).mean()

    def run(self, steps: int) -> Task:
        for _ in range(steps):
            self.optimizer.step(self.f, self.g)
        return self

    def point(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in (self.scores, *self.net.parameters())])

    @property
    def engine(self) -> Automatic:
        return self.optimizer.curvature
