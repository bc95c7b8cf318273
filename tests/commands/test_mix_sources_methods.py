"""What a step of T1-T2 does to the weights of ``mix_sources``, by hand."""

import torch

from examples.mix_sources.formulation import Mixing
from examples.mix_sources.methods import METHODS, Rates
from examples.mix_sources.problem import Mixture
from examples.mix_sources.transformer import Size


def mixing(windows=9):
    """Three sources of random letters."""
    torch.manual_seed(0)
    sources, clean = torch.randint(96, (3, 60)), torch.randint(96, (50,))
    kinds = ["wanted", "other", "corrupted"]
    mixture = Mixture(["a", "b", "c"], kinds, sources, clean, clean, 0)
    return Mixing(mixture, Size(width=8, layers=1, context=6), windows)


def test_t1_t2_follows_the_products_of_gradients(monkeypatch):
    """dL/du = -sum over k of dw_k/du <grad f, grad L_k>, of one step, not of those before."""
    task = mixing()
    method = METHODS["t1_t2"][0](task, Rates(1e-2, 0.1))
    monkeypatch.setattr(method, "lower_level", lambda: None)
    for _ in range(2):
        task.draw(equally=True)
        v = list(task.model.parameters())
        slope = torch.autograd.grad(task.upper_loss(), v)
        products = []
        for loss in task.source_losses():
            gradient = torch.autograd.grad(loss, v, retain_graph=True)
            products.append(-sum((g * s).sum() for g, s in zip(gradient, slope, strict=True)))
        logits = task.weights.logits
        (expected,) = torch.autograd.grad(task.weights(), logits, torch.stack(products))
        method.both_levels()
        torch.testing.assert_close(logits.grad, expected, rtol=3e-2, atol=1e-4)
        assert logits.grad.abs().max() > 1e-3
