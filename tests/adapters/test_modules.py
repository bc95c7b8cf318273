"""Modules with a state of their own in a step: BatchNorm, dropout, buffers; live and pure."""

import pytest
import torch
from classifying import classification, network
from torch import nn
from torch.nn import functional as F

from torch_penalty_bilevel import PenaltyBilevelOptimizer


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("lower_steps", [1, 4])
def test_batch_norm_moves_once_per_step_and_by_the_training_batch(lower_steps, curvature):
    x, y = classification()
    net = network(nn.BatchNorm1d(6))
    norm = net[1]
    u = torch.zeros(16, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], net.parameters(), lower_steps=lower_steps, curvature=curvature
    )
    mean_tensor = norm.running_mean
    for step in range(1, 4):
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        with torch.no_grad():
            hidden = net[0](x[:16])
        optimizer.step(
            lambda: F.cross_entropy(net(x[16:]), y[16:]),
            lambda: (u.sigmoid() * F.cross_entropy(net(x[:16]), y[:16], reduction="none")).mean(),
        )
        assert int(norm.num_batches_tracked) == step
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * hidden.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 * variance + 0.1 * hidden.var(0))
    assert norm.running_mean is mean_tensor  # the module's own tensor, not a replacement


def test_evaluation_mode_batch_norm_is_left_alone():
    x, y = classification()
    net = network(nn.BatchNorm1d(6)).eval()
    u = torch.zeros(24, requires_grad=True)
    before = net[1].running_mean.clone()
    optimizer = PenaltyBilevelOptimizer([u], net.parameters())
    optimizer.step(
        lambda: F.cross_entropy(net(x), y),
        lambda: (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean(),
    )
    assert torch.equal(net[1].running_mean, before)


def test_dropout_masks_replay_in_differences_and_change_between_steps():
    """From one seed both engines take the same steps, although every step draws a new mask."""
    x, y = classification()
    ends = []
    for curvature in ("double_backward", "finite_difference"):
        net = network(nn.Dropout(0.5))
        u = torch.zeros(24, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u], net.parameters(), curvature=curvature, upper_lr=0.1, lower_lr=0.01
        )
        losses = []

        def upper(net=net):
            return F.cross_entropy(net(x), y)

        def lower(net=net, u=u):
            return (u.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()

        torch.manual_seed(5)  # the engines' one-time checks leave no trace in the generator
        for _ in range(4):
            losses.append(float(optimizer.step(upper, lower)))
        assert len(set(losses)) == 4
        ends.append((torch.tensor(losses), u.detach().clone(), torch.rand(1)))
    assert torch.equal(ends[0][2], ends[1][2])
    for mine, other in zip(ends[0][:2], ends[1][:2], strict=True):
        # The difference errs by about 1e-9 relative; no gradient here is so small that Adam's
        # first steps, which are signs, would turn with it.
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8)


class Drifting(nn.Module):
    """Its output depends on how often it was called, through a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x):
        self.gain *= 1.5
        return x * self.gain


@pytest.mark.parametrize("curvature", ["double_backward", "finite_difference"])
def test_every_evaluation_starts_from_the_same_buffers(curvature):
    """Otherwise a difference would compare two different functions."""
    x, y = classification()
    net, fixed = network(Drifting()), network(nn.Identity())
    gradients = []
    for model, engine in ((net, curvature), (fixed, "double_backward")):
        u = torch.zeros(24, requires_grad=True)
        optimizer = PenaltyBilevelOptimizer(
            [u], model.parameters(), curvature=engine, penalty="paper"
        )
        gain = 1.0 if model is net else 1.5  # the identity, times what one call gains

        def logits(model=model, gain=gain):
            hidden = model[1](model[0](x)) * gain
            return model[3](model[2](hidden))

        optimizer.upper_step(
            lambda logits=logits: F.cross_entropy(logits(), y),
            lambda logits=logits, u=u: (
                u.exp() * F.cross_entropy(logits(), y, reduction="none")
            ).mean(),
        )
        gradients.append(u.grad)
    assert net[1].gain == 1.5
    # Central differences in float64 err by about 1e-9 relative.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-12)


def test_functional_mode_takes_dicts_by_name_and_freezes():
    x, y = classification()
    net, twin = network(), network()
    net[0].bias.requires_grad_(False)
    twin[0].bias.requires_grad_(False)
    u = torch.zeros(24, requires_grad=True)
    w = torch.zeros(24, requires_grad=True)
    pure = PenaltyBilevelOptimizer(
        [("weights", u)], net.named_parameters(), curvature="functional", lower_steps=2
    )
    live = PenaltyBilevelOptimizer(
        [w], twin.parameters(), curvature="double_backward", lower_steps=2
    )

    def pure_loss(upper, lower, **options):
        logits = torch.func.functional_call(net, lower, (x,))
        return F.cross_entropy(logits, y, **options)

    for _ in range(4):
        pure.step(
            lambda upper, lower: pure_loss(upper, lower),
            lambda upper, lower: (
                upper["weights"].exp() * pure_loss(upper, lower, reduction="none")
            ).mean(),
        )
        live.step(
            lambda: F.cross_entropy(twin(x), y),
            lambda: (w.exp() * F.cross_entropy(twin(x), y, reduction="none")).mean(),
        )
    torch.testing.assert_close(u.detach(), w.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
