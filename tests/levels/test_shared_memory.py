"""Parameters that share memory are refused, by name; views that do not meet are not."""

import pytest
import torch
from torch import nn

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer
from torch_penalty_bilevel.levels.aliasing import overlapping

KINDS = [PenaltyBilevelOptimizer, HypergradientOptimizer]


@pytest.mark.parametrize("make", KINDS)
def test_a_level_made_from_the_other_without_a_copy(make):
    net = nn.Linear(3, 1)
    aliases = {
        "detach": lambda: [p.detach().requires_grad_() for p in net.parameters()],
        "Parameter(data)": lambda: [nn.Parameter(p.data) for p in net.parameters()],
        "state_dict": lambda: [t.requires_grad_() for t in net.state_dict().values()],
    }
    for alias in aliases.values():
        with pytest.raises(ValueError, match=r"'upper\[0\]' and 'weight' .*clone"):
            make(alias(), net.named_parameters())
    make([p.detach().clone().requires_grad_() for p in net.parameters()], net.parameters())


@pytest.mark.parametrize("make", KINDS)
def test_within_a_level_and_in_a_group_added_later(make):
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    part = v.detach()[1:3].requires_grad_()
    with pytest.raises(ValueError, match=r"'lower\[0\]' and 'lower\[1\]'"):
        make([u], [v, part])
    optimizer = make([u], [v])
    for level in ("upper", "lower"):
        with pytest.raises(ValueError, match=r"'lower\[0\]' and 'part' .*share memory"):
            optimizer.add_param_group({"params": [("part", part)], "level": level})
        with pytest.raises(ValueError, match=r"share memory"):
            optimizer.add_param_group({"params": part, "level": level})
    assert len(optimizer.param_groups) == 2


def test_views_of_one_buffer_that_do_not_meet():
    """They move as tensors of their own do."""
    flat, ends = torch.linspace(-1.0, 1.0, 12), []
    views = [flat[a : a + 4] for a in (0, 4, 8)]
    for tensors in ([t.clone() for t in views], views):
        u, v, w = (t.requires_grad_() for t in tensors)
        optimizer = PenaltyBilevelOptimizer([u], [v, w], upper_lr=0.1, lower_lr=0.1)
        for _ in range(3):
            optimizer.step(
                lambda v=v, w=w: (v - 1).square().sum() + w.sum(),
                lambda u=u, v=v, w=w: (v - u).square().sum() + (w + 2 * u).square().sum(),
            )
        ends.append([t.detach().clone() for t in (u, v, w)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], torch.linspace(-1.0, 1.0, 12)[:4])
    table = torch.zeros(4, 3)
    PenaltyBilevelOptimizer(
        [table[:, 0].detach().requires_grad_()], [table[:, 1:].detach().requires_grad_()]
    )


def test_exactly_like_a_set_of_addresses():
    """Random views with steps, transposes and other dtypes, against their elements' addresses."""
    generator = torch.Generator().manual_seed(5)
    base, outcomes = torch.zeros(60, dtype=torch.float64), []
    for _ in range(200):
        views, sets = [], []
        for _ in range(2):
            a, b, s, t, o = torch.randint(1, 5, (5,), generator=generator).tolist()
            view = base.as_strided((a, b), (s, 3 * t), o)
            if o == 1:
                view = view.view(torch.int64)
            elements = {o + i * s + j * 3 * t for i in range(a) for j in range(b)}
            views.append(view)
            sets.append(elements)
        outcomes.append(bool(sets[0] & sets[1]))
        assert (overlapping(views) == (0, 1)) == outcomes[-1]
    assert 20 < sum(outcomes) < 180


def test_tensors_without_memory():
    sparse = torch.eye(2).to_sparse()
    empty = torch.zeros(0, 3)
    assert overlapping([sparse, sparse.detach(), empty, empty.detach()]) is None
    meta = torch.zeros(3, device="meta")
    assert overlapping([meta, meta.detach()]) is None


def test_a_long_tensor_may_meet_one_behind_its_neighbour():
    memory = torch.zeros(10)
    even, odd, later = memory[::2], memory[1:4:2], memory[4:5]
    assert overlapping([even, odd]) is None
    assert overlapping([even, odd, later]) == (0, 2)
