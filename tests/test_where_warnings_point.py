"""A warning names the line of the user's program, at whatever depth it was given."""

import pytest
import torch
from networks import OnceCube

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer, PenaltyBilevelOptimizer


def leaf(*values):
    return torch.tensor(values).requires_grad_()


def far_off():
    """The watch, in the 300th step."""
    torch.manual_seed(0)
    u, v = leaf(*[3.0] * 20), leaf(*[-2.0] * 20)
    optimizer = PenaltyBilevelOptimizer([u], [v], upper_lr=0.1, lower_lr=0.1, penalty="value")
    for _ in range(400):
        optimizer.step(lambda: u @ u + v @ v, lambda: (1 - u - v) @ (1 - u - v))


def swapped():
    """The look at dependences, in the first step."""
    u, v = leaf(1.0), leaf(1.0)
    PenaltyBilevelOptimizer([u], [v]).step(lambda: (u * v).sum(), lambda: v.square().sum())


def swapped_there():
    u, v = leaf(1.0), leaf(1.0)
    HypergradientOptimizer([u], [v]).step(lambda: (u * v).sum(), lambda: v.square().sum())


def kept():
    """A tensor that a closure moves."""
    u, v, count = leaf(1.0), leaf(1.0), torch.zeros(())

    def g():
        count.add_(1)
        return (v - u).square().sum()

    PenaltyBilevelOptimizer([u], [v]).step(lambda: v.square().sum(), g)


def hooked():
    """The engine, when its first product fails."""
    u, v = leaf(1.0, 2.0), leaf(1.0, 3.0)
    optimizer = PenaltyBilevelOptimizer([u], [v])
    optimizer.step(lambda: v.sum(), lambda: OnceCube.apply(v - u).sum())


@pytest.mark.parametrize("trouble", [far_off, swapped, swapped_there, kept, hooked])
def test_it_points_at_the_program(trouble):
    with pytest.warns(BilevelWarning) as seen:
        trouble()
    ours = [w for w in seen if issubclass(w.category, BilevelWarning)]
    assert {w.filename for w in ours} == {__file__}
