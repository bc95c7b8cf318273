"""A network on rows, its losses in parts and the same in one closure; whole states to compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_penalty_bilevel import EpsilonTest, Stationarity, ValueGap

Closure = Callable[[], Any]
PENALTIES: dict[str, Callable[[], Any]] = {
    "stationarity": Stationarity,
    "paper": lambda: Stationarity(EpsilonTest(weight=1.0)),  # q depends on r, and much
    "value": ValueGap,
}
# With the tolerance of equality: a difference over a shift h takes 1 / h of what rounding leaves.
ENGINES = {"double_backward": 1e-12, "auto": 1e-12, "finite_difference": 1e-9}


def joined(closures: Sequence[Closure]) -> Closure:
    """The mean in one closure, with the graphs of all: the slow twin."""

    def mean() -> Any:
        values = [closure() for closure in closures]
        if isinstance(values[0], tuple):
            return tuple(torch.stack(parts).mean(0) for parts in zip(*values, strict=True))
        return torch.stack(values).mean()

    return mean


class Rows:
    """One weight per sample, each in one micro-batch; BatchNorm and dropout; 5 rows in none."""

    def __init__(self, dtype: torch.dtype = torch.float64, count: int = 4) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(53, 6, dtype=dtype), torch.randint(0, 3, (53,))
        # No bias before BatchNorm: its gradient is nothing but rounding.
        self.net = nn.Sequential(
            nn.Linear(6, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(16, 3),
        ).to(dtype)
        self.u = torch.zeros(37, dtype=dtype, requires_grad=True)
        self.upper = [lambda i=i: self.f(i) for i in torch.arange(37, 53).chunk(count)]
        self.lower = [lambda i=i: self.g(i) for i in torch.arange(32).chunk(count)]

    def f(self, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.net(self.x[rows]), self.y[rows])

    def g(self, rows: Tensor) -> Tensor:
        each = F.cross_entropy(self.net(self.x[rows]), self.y[rows], reduction="none")
        return (self.u[rows].sigmoid() * each).mean()

    def rules(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        lower = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return torch.optim.SGD([self.u], lr=1.0), lower

    def state(self, optimizer: Any) -> Tensor:
        """All that a step moves, and the random numbers that come next."""
        moved = [self.u, *self.net.state_dict().values(), *optimizer.adjoint, torch.rand(3)]
        return torch.cat([t.detach().double().reshape(-1) for t in moved])


def large(width: int, rows: int, dtype: torch.dtype = torch.float32) -> Any:
    """A deep network whose activations weigh far more than its parameters, and rows of data."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(width, width), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(width, 1)).to(dtype)
    return net, torch.randn(8 * rows, width, dtype=dtype).chunk(8)
