"""Learned weight decay against torch.optim's own, and who owns what."""

import copy
import pickle

import pytest
import torch
from blocks import check_hypergradient, every_engine
from torch import nn

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import WeightDecay

PER = ["tensor", "feature", "element"]


def network():
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 2))


def spread(decay):
    with torch.no_grad():
        decay.log_strengths.copy_(torch.linspace(-3, 1, decay.log_strengths.numel()))
    return decay


@pytest.mark.parametrize("per", PER)
def test_value_in_closed_form(per):
    model = network()
    decay = spread(WeightDecay(model, per=per))
    assert decay.names == ("0.weight", "3.weight")
    u, conv, dense = decay.log_strengths.detach().exp(), model[0].weight, model[3].weight
    wanted = {
        "tensor": lambda: u[0] * conv.square().sum() + u[1] * dense.square().sum(),
        "feature": lambda: u[:2] @ conv.square().sum((0, 2)) + u[2:] @ dense.square().sum(0),
        "element": lambda: u[:12] @ conv.square().reshape(-1) + u[12:] @ dense.square().reshape(-1),
    }[per]()
    torch.testing.assert_close(decay(), wanted / 2)
    shapes = {"tensor": [(), ()], "feature": [(2,), (6,)], "element": [(3, 2, 2), (2, 6)]}[per]
    assert [tuple(s.shape) for s in decay.strengths().values()] == shapes
    torch.testing.assert_close(
        torch.cat([s.reshape(-1) for s in decay.strengths().values()]).detach(), u
    )


@pytest.mark.parametrize("per", PER)
def test_its_gradient_is_torchs_weight_decay(per):
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    WeightDecay(model, per=per, initial=0.3)().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    weights = [p for p in twin.parameters() if p.dim() > 1]
    for p in weights:
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(weights, lr=0.1, weight_decay=0.3).step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_it_reads_live_weights_and_owns_strengths_alone():
    model = network()
    decay = WeightDecay(model, initial=2.0)
    assert [name for name, _ in decay.named_parameters()] == ["log_strengths"]
    assert [*decay.state_dict()] == ["log_strengths"]
    assert [*decay.modules()] == [decay]
    other = network()
    model.load_state_dict(other.state_dict(), assign=True)  # other tensors under these names
    wanted = sum(p.square().sum() for p in model.parameters() if p.dim() > 1)
    torch.testing.assert_close(decay(), wanted)
    (slope,) = torch.autograd.grad(decay(), model[3].weight)
    torch.testing.assert_close(slope, 2 * model[3].weight)


def test_pairs_take_part_whatever_their_dimensions():
    layer = nn.Linear(3, 2)
    frozen = layer.weight.requires_grad_(False)
    decay = WeightDecay(layer.named_parameters(), initial=1.0)
    assert decay.names == ("weight", "bias")
    torch.testing.assert_close(decay(), (frozen.square().sum() + layer.bias.square().sum()) / 2)
    with pytest.raises(ValueError, match="nothing to decay"):
        WeightDecay(layer)
    assert [*decay.state_dict()] == ["log_strengths"]


@pytest.mark.parametrize("per", PER)
def test_weights_by_name(per):
    model = network()
    decay = spread(WeightDecay(model, per=per))
    given = {name: 2 * p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(decay(given), 4 * decay())
    called = torch.func.functional_call(decay, dict(decay.named_parameters()), (given,))
    torch.testing.assert_close(called, 4 * decay())
    del given["3.weight"]
    with pytest.raises(ValueError, match=r"parameters lacks \['3.weight'\]"):
        decay(given)


def test_a_copy_of_both_belongs_together():
    model = network()
    decay = spread(WeightDecay(model))
    for net, own in (
        copy.deepcopy((model, decay)),
        pickle.loads(pickle.dumps((model, decay))),
        copy.deepcopy((decay, model))[::-1],
    ):
        torch.testing.assert_close(own(), decay())
        before = own().detach()
        with torch.no_grad():
            net[3].weight.mul_(10)
        assert float(own().detach()) > 2 * float(before)
        torch.testing.assert_close(decay().detach(), before)  # the first model has not moved


@every_engine
@pytest.mark.parametrize("per", PER)
def test_hypergradient_in_the_optimizer(engine, per):
    x, y, model = torch.randn(12, 3), torch.randn(12, 2), nn.Linear(3, 2)
    decay = spread(WeightDecay(model, per=per))
    check_hypergradient(
        decay.parameters(),
        model.parameters(),
        lambda: (model(x[:5]) - y[:5]).square().mean(),
        lambda: (model(x) - y).square().mean() + decay(),
        engine,
        lr=0.3,
        steps=200,
    )


def test_pure_functions_give_the_same_step():
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    ends = []
    for pure in (False, True):
        torch.manual_seed(2)
        model = nn.Linear(3, 2)
        decay = WeightDecay(model, per="feature", initial=0.1)

        def g(upper, lower, model=model, decay=decay):
            fit = (torch.func.functional_call(model, lower, (x,)) - y).square().mean()
            return fit + torch.func.functional_call(decay, upper, (lower,))

        def f(upper, lower, model=model):
            return (torch.func.functional_call(model, lower, (x[:5],)) - y[:5]).square().mean()

        live = (
            lambda model=model: (model(x[:5]) - y[:5]).square().mean(),
            lambda model=model, decay=decay: (model(x) - y).square().mean() + decay(),
        )
        optimizer = PenaltyBilevelOptimizer(
            decay.named_parameters(),
            model.named_parameters(),
            upper_lr=0.01,
            lower_lr=0.01,
            curvature="functional" if pure else "double_backward",
        )
        for _ in range(10):
            optimizer.step(*((f, g) if pure else live))
        ends.append(decay.log_strengths.detach())
    torch.testing.assert_close(*ends)


def test_a_functional_call_of_a_parent_replaces_the_live_weights():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Sequential(nn.Linear(2, 2))
            self.decay = WeightDecay(self.m, initial=0.5)

        def forward(self):
            return self.decay()

    parent, weight = Parent(), torch.randn(2, 2, requires_grad=True)
    value = torch.func.functional_call(parent, {"m.0.weight": weight}, ())
    torch.testing.assert_close(value, 0.25 * weight.square().sum())
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], 0.5 * weight)
    torch.testing.assert_close(parent(), 0.25 * parent.m[0].weight.square().sum())


def test_half_precision_weights_are_squared_in_single():
    weight = torch.full((1, 1000), 0.1, dtype=torch.bfloat16)
    decay = WeightDecay([("w", weight)], initial=1.0)
    assert decay.log_strengths.dtype == torch.float32
    torch.testing.assert_close(decay(), weight.float().square().sum() / 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: WeightDecay(nn.Linear(2, 2), per="row"), ValueError, "per must be one of .*'row'"),
        (lambda: WeightDecay(nn.Linear(2, 2), initial=0), ValueError, "initial must be a finite"),
        (
            lambda: WeightDecay(nn.Linear(2, 2, dtype=torch.float32), initial=1e300),
            ValueError,
            r"initial=1e\+300 is inf as torch.float32",
        ),
        (lambda: WeightDecay(nn.LayerNorm(2)), ValueError, "weights has nothing to decay"),
        (lambda: WeightDecay([torch.ones(2)]), TypeError, "pairs .*, got Tensor in it"),
        (lambda: WeightDecay([("a", torch.ones(2).long())]), TypeError, "floating-point tensor"),
        (lambda: WeightDecay([("a", torch.ones(2))] * 2), ValueError, r"twice, got \['a', 'a'\]"),
        (
            lambda: WeightDecay(nn.Linear(2, 2).named_parameters(), per="feature"),
            ValueError,
            r"needs weights \(out, in, ...\), got 'bias' of shape \(2,\)",
        ),
    ],
)
def test_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()
