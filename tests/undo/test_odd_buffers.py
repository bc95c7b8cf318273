"""Buffers that cannot be compared or written into as others can: sparse, expanded and the like."""

import pytest
import torch
from torch import nn

from torch_penalty_bilevel import NonFiniteError, PenaltyBilevelOptimizer


def of_inference():
    with torch.inference_mode():
        return torch.ones(3)


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "expanded": lambda: torch.ones(1).expand(3),
    "inference": of_inference,
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3).float(), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
}


class Weighing(nn.Module):
    """A layer with an odd buffer, which it leaves, replaces or writes into."""

    def __init__(self, buffer, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 1), how
        self.register_buffer("odd", buffer)

    def forward(self, x):
        if self.how == "replaces":
            self.odd = 0.5 * self.odd
        elif self.how == "writes":
            self.odd.mul_(0.5)
        return self.layer(x)


def task(buffer, how, both=True):
    torch.manual_seed(0)
    net, x, y = Weighing(buffer, how), torch.randn(8, 3), torch.randn(8, 1)
    u = torch.zeros(4, 1, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), upper_lr=0.1, lower_lr=0.1)

    def f():
        used = net if both else net.layer
        return (used(x[4:]) - y[4:]).square().mean()

    return net, u, optimizer, f, lambda: (u.sigmoid() * (net(x[:4]) - y[:4]).square()).mean()


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:.*(prototype|Sparse CSR|quantize)")
def test_they_stay_where_nothing_moves_them(kind, both):
    """Every step raised when it was over, with v and u moved."""
    buffer = ODD[kind]()
    net, u, optimizer, f, g = task(buffer, "leaves", both)
    _, other, beside, *losses = task(None, "leaves", both)
    for _ in range(3):
        optimizer.step(f, g)
        beside.step(*losses)
    with pytest.raises(NonFiniteError):
        optimizer.step(f, lambda: g() / 0)
    assert net.odd is buffer
    assert torch.equal(u, other)
    assert not torch.equal(u, torch.zeros(4, 1))


@pytest.mark.parametrize("how", ["replaces", "writes"])
@pytest.mark.parametrize("kind", ["sparse", "expanded", "inference"])
@pytest.mark.parametrize("parts", [1, 2])
def test_they_move_once_in_a_step(kind, how, parts):
    buffer = ODD[kind]()
    net, _, optimizer, f, g = task(buffer, how)
    for step in range(1, 4):
        optimizer.step(f, g if parts == 1 else [g, g])
        dense = net.odd.to_dense() if kind == "sparse" else net.odd
        expected = torch.eye(3) if kind == "sparse" else torch.ones(3)
        assert torch.equal(dense, expected * 0.5 ** (step * parts))
    held = net.odd
    with pytest.raises(NonFiniteError):
        optimizer.step(f, lambda: g() / 0)
    assert net.odd is held
