"""What one step of each method of ``mix_sources`` does to the weights, by hand."""

import copy

import pytest
import torch
from mixing import mixing

from examples.mix_sources.formulation import allotted, letter_losses
from examples.mix_sources.methods import METHODS, Rates, plain_step


def test_t1_t2_follows_the_products_of_gradients():
    """dL/du = -sum over k of dw_k/du <grad f, grad L_k>, at v as its own step has left it."""
    task = mixing()
    method = METHODS["t1_t2"][0](task, Rates(0.1, 0.1))
    twin = copy.deepcopy(task)  # its v moves by Adam, its u not at all
    rule = torch.optim.Adam(twin.model.parameters(), lr=0.1)
    v = list(twin.model.parameters())
    for number in range(2):
        for each in (task, twin):
            torch.manual_seed(number)
            each.draw(equally=True)
        twin.weights.load_state_dict(task.weights.state_dict())
        plain_step(rule, twin.plain_loss)
        slope = torch.autograd.grad(twin.upper_loss(), v)
        products = []
        for loss in twin.source_losses():
            gradient = torch.autograd.grad(loss, v, retain_graph=True)
            products.append(-sum((g * s).sum() for g, s in zip(gradient, slope, strict=True)))
        logits = twin.weights.logits
        (expected,) = torch.autograd.grad(twin.weights(), logits, torch.stack(products))
        method.both_levels()
        found = task.weights.logits.grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # differences of 1e-4
        assert found.abs().max() > 1e-3
        for p, q in zip(task.model.parameters(), v, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["penalty", "t1_t2"])
def test_weights_are_held_between_the_steps_of_u(name):
    task = mixing()
    with torch.no_grad():
        task.weights.logits.copy_(torch.tensor([1.5, 0.0, -1.0]))
    method = METHODS[name][0](task, Rates(1e-2, 0.1), every=2)
    method.refresh()
    held, counts = [task.held], []
    for number in range(6):
        method.step(number, 0)
        held.append(task.held)
        counts.append(task.counts.tolist())
        torch.testing.assert_close(task.held, task.weights.logits.softmax(0), rtol=0, atol=0)
        drawn = [3, 3, 3] if number % 2 else allotted(held[number].tolist(), 9)
        assert counts[number] == drawn
    moved = [not torch.equal(held[n], held[n + 1]) for n in range(6)]
    # The multiplier is 0 in the penalty's first step of u.
    assert moved == [False, name != "penalty", False, True, False, True]
    assert counts[0] == [6, 2, 1]


def test_the_weights_of_doremi_are_the_mean_over_its_steps():
    """log w <- log w + rate * excess, mixed with 0.001 of equal weights; the mean trains v."""
    task = mixing()
    method = METHODS["doremi"][0](task, Rates(1e-2, 2.0))
    with torch.no_grad():
        for p in method.reference.parameters():
            p.mul_(1.3)
    logs, found = torch.full((3,), 1 / 3).log(), []
    for number in range(3):
        torch.manual_seed(number)
        task.draw()
        losses = [letter_losses(m, task.drawn) for m in (method.proxy, method.reference)]
        excess = task.per_source((losses[0] - losses[1]).clamp(min=0)).detach()
        weights = (logs + 2.0 * excess).softmax(0) * 0.999 + 1e-3 / 3
        logs = weights.log()
        found.append(weights)
        torch.manual_seed(number)
        method.step(number, 1)
        torch.testing.assert_close(method.weights(), sum(found) / len(found))
    assert (found[2] - found[0]).abs().max() > 1e-2
    before = [p.detach().clone() for p in method.proxy.parameters()]
    method.step(0, 2)
    torch.testing.assert_close(task.held, sum(found) / 3)
    assert all(map(torch.equal, before, method.proxy.parameters()))
