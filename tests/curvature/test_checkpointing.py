"""Activation checkpointing in the closures: the steps of the closures without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from torch_penalty_bilevel import DoubleBackwardError, NonFiniteError, PenaltyBilevelOptimizer


class Blocks(nn.Module):
    """Two residual blocks with dropout, whose masks the second forward pass has to draw again."""

    def __init__(self, reentrant: bool | None, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), norm(6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def task(reentrant: bool | None, norm: type[nn.Module] = nn.LayerNorm, **options):
    torch.manual_seed(0)
    net = Blocks(reentrant, norm)
    u = torch.zeros(24, requires_grad=True)
    x, y = torch.randn(36, 6).requires_grad_(), torch.randint(0, 3, (36,))
    optimizer = PenaltyBilevelOptimizer(
        [u], net.parameters(), upper_lr=0.1, lower_lr=0.01, **options
    )

    def f() -> Tensor:
        return cross_entropy(net(x[24:]), y[24:])

    def g() -> Tensor:
        return (u.sigmoid() * cross_entropy(net(x[:24]), y[:24], reduction="none")).mean()

    return net, u, optimizer, f, g


ENGINES = ["auto", "double_backward", "finite_difference"]


@pytest.mark.parametrize("options", [*({"curvature": e} for e in ENGINES), {"penalty": "value"}])
def test_steps_are_those_without(options: dict[str, str]) -> None:
    ends = []
    for reentrant in (None, False):
        net, u, optimizer, f, g = task(reentrant, **options)
        torch.manual_seed(1)
        for _ in range(6):
            optimizer.step(f, g)
        ends.append(torch.cat([u, *[p.reshape(-1) for p in net.parameters()], torch.rand(1)]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def statistics(net: nn.Module) -> Tensor:
    return torch.cat([buffer.reshape(-1).double() for buffer in net.buffers()])


@pytest.mark.parametrize("options", [*({"curvature": e} for e in ENGINES), {"penalty": "value"}])
def test_batch_norm_moves_once_by_the_lower_loss(options: dict[str, str]) -> None:
    """The second forward pass of f would leave statistics of the validation data behind."""
    ends = []
    for reentrant in (None, False):
        net, _, optimizer, f, g = task(reentrant, norm=nn.BatchNorm1d, **options)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.step(f, g)
        assert {int(b) for name, b in net.named_buffers() if "num_batches" in name} == {3}
        ends.append(statistics(net))
        optimizer.check_hypergradient(f, g, max_iterations=2, resolve=False)
        assert torch.equal(statistics(net), ends[-1])
        with pytest.raises(NonFiniteError):
            optimizer.step(f, lambda g=g: g() / 0)
        assert torch.equal(statistics(net), ends[-1])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [*({"curvature": e} for e in ENGINES), {"penalty": "value"}])
def test_the_reentrant_kind_is_refused_with_the_remedy(options: dict[str, str]) -> None:
    """autograd.grad leaves out parameters used inside of it, for every engine."""
    net, u, optimizer, f, g = task(True, **options)
    before = [t.clone() for t in (u, *net.parameters(), torch.get_rng_state())]
    with pytest.raises(DoubleBackwardError, match=r"checkpoint\(\.\.\., use_reentrant=False\)"):
        optimizer.step(f, g)
    after = (u, *net.parameters(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
