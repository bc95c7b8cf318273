"""Micro-batches: buffers, inequalities, what is refused, and the memory of one."""

import pytest
import torch
from memory import peak_bytes
from micro_batches import ENGINES, PENALTIES, Rows, joined, large
from torch import nn

from torch_penalty_bilevel import (
    NondeterministicClosureError,
    NonFiniteError,
    PenaltyBilevelOptimizer,
    constraints,
)

# Buffers.


def test_batchnorm_moves_once_for_each_micro_batch():
    rows, twin = Rows(), Rows()
    PenaltyBilevelOptimizer(*rows.rules()).step(rows.upper, rows.lower)
    for closure in twin.lower:
        closure()
    assert int(rows.net[1].num_batches_tracked) == 4
    torch.testing.assert_close(rows.net[1].running_mean, twin.net[1].running_mean)


class Chain(nn.Module):
    """A buffer on which the loss depends, written anew from v in every call."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))
        self.register_buffer("before", torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        value = self.v * x + 0.3 * self.before.detach() * self.v.square()
        self.before = self.before + value.tanh()
        return value


@pytest.mark.parametrize("curvature", ENGINES)
def test_each_part_goes_on_where_the_one_before_left_the_buffers(curvature):
    ends = []
    for of in (lambda each: each, joined):
        module, u = Chain(), torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer([u], [module.v], curvature=curvature)

        def g(x, module=module, u=u):
            return ((module(x) - u) ** 2).sum() + module.v.square().sum()

        lower = [lambda x=x, g=g: g(x) for x in (1.0, -0.5, 2.0)]
        for _ in range(4):
            optimizer.step(lambda m=module: (m.v**2).sum(), of(lower))
        ends.append(torch.cat([u, module.v, module.before, *optimizer.adjoint]).detach())
    # Adam divides small gradients by themselves, so that rounding counts for more.
    torch.testing.assert_close(*ends, rtol=0, atol=1e3 * ENGINES[curvature])


# What goes wrong.


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_part_that_is_not_finite_changes_nothing(level, penalty):
    rows = Rows()
    optimizer = PenaltyBilevelOptimizer(*rows.rules(), penalty=PENALTIES[penalty]())
    optimizer.step(rows.upper, rows.lower)
    state = torch.get_rng_state()
    before = rows.state(optimizer)
    torch.set_rng_state(state)
    getattr(rows, level)[2] = lambda: rows.net(rows.x[:4]).sum() * rows.u.sum() * torch.nan
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        optimizer.step(rows.upper, rows.lower)
    assert torch.equal(rows.state(optimizer), before)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("curvature", ENGINES)
def test_batches_drawn_inside_are_noticed(curvature, penalty):
    rows = Rows()
    optimizer = PenaltyBilevelOptimizer(
        *rows.rules(), curvature=curvature, penalty=PENALTIES[penalty]()
    )
    stream = iter(range(10_000))

    def drawing():
        k = next(stream)
        return rows.g(torch.arange(32).roll(5 * k)[: 4 + k % 3])

    with pytest.raises(NondeterministicClosureError, match="draw the batch"):
        optimizer.step(rows.upper, [*rows.lower, drawing])


def test_what_is_no_closure():
    rows = Rows()
    optimizer = PenaltyBilevelOptimizer(*rows.rules())
    with pytest.raises(ValueError, match="lower_closure is empty"):
        optimizer.step(rows.upper, [])
    with pytest.raises(TypeError, match="upper_closure is a sequence whose entry 1 is int"):
        optimizer.step([rows.upper[0], 3], rows.lower)
    with pytest.raises(TypeError, match="lower_closure is NoneType"):
        optimizer.step(rows.upper[:3])
    with pytest.raises(TypeError, match="upper_closure is generator"):
        optimizer.step((c for c in rows.upper), rows.lower)


def test_two_without_a_lower_closure_are_the_pair():
    """Also where both are sequences; with a lower closure two are micro-batches."""
    ways = [
        lambda o, f, g: o.step((f, g)),
        lambda o, f, g: o.step([f, g]),
        lambda o, f, g: o.step(closure=(f, g)),
        lambda o, f, g: o.step(closure=f, lower_closure=g),
        lambda o, f, g: o.step(tuple(f), tuple(g)),
    ]
    ends = []
    for way in ways:
        rows = Rows(count=2)
        optimizer = PenaltyBilevelOptimizer(*rows.rules())
        torch.manual_seed(1)
        way(optimizer, rows.upper, rows.lower)
        ends.append(rows.state(optimizer))
    assert all(torch.equal(end, ends[0]) for end in ends)


# Memory.


@pytest.mark.parametrize("curvature", ["finite_difference", "double_backward"])
def test_memory_is_that_of_one_micro_batch(curvature):
    """Of all steps, the first included: what the allocator of torch says."""

    def peak(count):
        net, batches = large(32, 2048)
        u = torch.zeros(1, requires_grad=True)
        rules = torch.optim.SGD([u], lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer = PenaltyBilevelOptimizer(*rules, curvature=curvature)
        upper = [lambda x=x: net(x).square().mean() for x in batches[:count]]
        lower = [lambda x=x: (net(x) - u.exp()).square().mean() for x in batches[:count]]
        return peak_bytes(lambda: [optimizer.step(upper, lower) for _ in range(2)])

    assert peak(8) <= 1.1 * peak(1)


@pytest.mark.parametrize("kind", ["upper", "lower"])
def test_an_inequality_is_evaluated_once(kind):
    ends = []
    for of in (lambda each: each, joined):
        rows, calls = Rows(), []

        def h(rows=rows, calls=calls):
            calls.append(0)
            return rows.net[0].weight.square().sum().reshape(1) - 1 - rows.u.mean()

        limit = {f"{kind}_constraint": constraints.Inequality(h)}
        optimizer = PenaltyBilevelOptimizer(*rows.rules(), **limit)
        torch.manual_seed(1)
        values = [optimizer.step(of(rows.upper), of(rows.lower)) for _ in range(4)]
        ends.append(torch.cat([rows.state(optimizer), torch.stack(values)]))
        (multiplier,) = optimizer.inequality_multipliers[kind]
        assert float(multiplier) > 0
        calls.clear()
        optimizer.step(of(rows.upper), of(rows.lower))
        assert len(calls) <= 4  # r and, part by part, a product; a probe
    torch.testing.assert_close(*ends, rtol=0, atol=1e-11)
