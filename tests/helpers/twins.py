"""Problems that are the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from contract import ENGINES, FORMULATIONS, Problem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from torch_penalty_bilevel import PenaltyBilevelOptimizer


class Twin(Problem):
    """The problem of ``contract.py``, each tensor on a device of its own; computed ``here``."""

    def __init__(
        self,
        formulation: str,
        engine: str,
        here: str,
        upper: str | None = None,
        lower: Sequence[str] = (),
    ) -> None:
        super().__init__(FORMULATIONS[formulation], ENGINES[engine])
        self.here = here
        for name in ("A", "M", "B", "b", "c"):
            setattr(self, name, getattr(self, name).to(here))
        self.u = self.u.detach().to(upper or here).requires_grad_()
        places = lower or (here, here)
        self.v = [v.detach().to(d).requires_grad_() for v, d in zip(self.v, places, strict=True)]

    @property
    def closures(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def taken(loss: Callable[..., Any], u: Tensor, v: Sequence[Tensor]) -> Any:
            value = loss(u.to(self.here), torch.cat([t.to(self.here) for t in v]))
            if isinstance(value, tuple):  # a map: where v is
                return tuple(p.to(t.device) for p, t in zip(value, v, strict=True))
            return value

        if self.engine.takes_pure:
            f, g = ((lambda u, v, h=h: taken(h, u[0], v)) for h in (self._f, self._g))
        else:
            f, g = ((lambda h=h: taken(h, self.u, self.v)) for h in (self._f, self._g))
        return f, g

    def optimizer(self, **options: Any) -> PenaltyBilevelOptimizer:
        """The one of ``test_contract.py``."""
        return PenaltyBilevelOptimizer(
            torch.optim.Adam([self.u], lr=0.02),
            torch.optim.SGD(self.v, lr=0.1, momentum=0.5),
            penalty=self.formulation.make(),
            curvature=self.engine.make(),
            **options,
        )

    def point(self) -> Tensor:
        return torch.cat([t.detach().cpu() for t in (self.u, *self.v)])


class Cleaning:
    """One weight per sample, of which half are in each batch, over BatchNorm and dropout."""

    def __init__(
        self,
        engine: str,
        here: str,
        drop: float = 0.3,
        rules: Sequence[Callable[..., Any]] = (),
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 3)
            ).to(here, dtype)
        self.x = torch.randn(60, 5, generator=draw).to(here, dtype)
        self.y = torch.randint(0, 3, (60,), generator=draw).to(here)
        self.u = torch.zeros(40, device=here, dtype=dtype, requires_grad=True)
        self.shift = torch.zeros(3, device=here, dtype=dtype, requires_grad=True)
        levels: list[Any] = [[self.u, self.shift], list(self.net.parameters())]
        rates = {} if rules else {"upper_lr": 0.02, "lower_lr": 0.02}
        if rules:
            levels = [rule(level) for rule, level in zip(rules, levels, strict=True)]
        self.made = PenaltyBilevelOptimizer(*levels, curvature=engine, **rates, **options)
        self.batches = [torch.arange(start, start + 20, device=here) for start in (0, 20)]
        self.batch, self.calls, self.fatal = self.batches[0], 0, 0

    def f(self) -> Tensor:
        return F.cross_entropy(self.net(self.x[40:]), self.y[40:])

    def g(self) -> Tensor:
        self.calls += 1
        logits = self.net(self.x[self.batch]) + self.shift
        each = F.cross_entropy(logits, self.y[self.batch], reduction="none")
        if self.calls == self.fatal:
            raise KeyError("stop")
        return (self.u[self.batch].sigmoid() * each).mean()

    def run(self, steps: int = 1) -> Cleaning:
        for k in range(steps):
            self.batch = self.batches[k % 2]
            self.made.step(self.f, self.g)
        return self

    def tensors(self) -> list[Tensor]:
        """What a step moves."""
        held = tree_leaves(self.made.state_dict())
        moved = [*self.net.state_dict().values(), self.u, self.shift]
        return moved + [t for t in held if isinstance(t, Tensor)]

    def point(self) -> Tensor:
        moved = [*self.net.state_dict().values(), self.u, self.shift]
        return torch.cat([t.detach().double().cpu().reshape(-1) for t in moved])
