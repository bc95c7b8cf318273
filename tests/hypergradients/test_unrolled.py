"""Reverse and forward differentiation of the lower steps: autograd's numbers, less memory."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypergradient_runs import UNROLLED
from problems import normal
from torch import Tensor
from torch.testing import assert_close

from examples.shared.memory import peak_bytes
from torch_penalty_bilevel import BilevelWarning
from torch_penalty_bilevel.functional import hypergradient


def wavy(u: Tensor, v: Tensor) -> Tensor:
    """A lower loss with third derivatives: H and J differ along the way."""
    return (v - u[:4]).pow(4).sum() / 4 + (v * v * u.sum().exp()).sum() / 2 + (v[0] * v[1]) ** 2


def turning(u: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(0.7 * torch.roll(v, 1) + u[:4] * v + u[0])


def score(u: Tensor, v: Tensor) -> Tensor:
    return (v.sin() * u[:4]).sum() + u.square().sum()


def unrolled(lower: Any, is_map: bool, u: Tensor, v: Tensor, eta: float, steps: int, kept: int):
    """Autograd through the last ``kept`` of ``steps`` steps."""
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    for t in range(steps):
        if is_map:
            r = v - lower(u, v)
        else:
            (r,) = torch.autograd.grad(lower(u, v), v, create_graph=True)
        v = v - eta * r
        if t < steps - kept:
            v = v.detach().requires_grad_()
    return torch.autograd.grad(score(u, v), u)[0]


@pytest.mark.parametrize("method", UNROLLED)
@pytest.mark.parametrize(("lower", "is_map"), [(wavy, False), (turning, True)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_is_the_derivative_of_the_steps(method: str, lower: Any, is_map: bool, steps: int) -> None:
    u, v = 0.3 * normal(4, seed=1), normal(4, seed=2)
    options = {"lower_steps": steps, "step_size": 0.1, "lower_is_map": is_map}
    with pytest.warns(BilevelWarning):
        gradient, _ = hypergradient(score, lower, u, v, method=method, **options)
    expected = unrolled(lower, is_map, u, v, 0.1, steps, steps)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_truncation_goes_back_through_the_last_steps_only(kept: int) -> None:
    u, v = 0.3 * normal(4, seed=1), normal(4, seed=2)
    options = {"lower_steps": 6, "step_size": 0.1, "truncation": kept}
    with pytest.warns(BilevelWarning):
        gradient, info = hypergradient(score, wavy, u, v, method="reverse", **options)
    assert_close(gradient, unrolled(wavy, False, u, v, 0.1, 6, kept), rtol=1e-12, atol=1e-13)
    assert info.iterations == kept


@pytest.mark.parametrize("method", UNROLLED)
def test_a_lower_level_that_still_moves_is_not_converged(method: str) -> None:
    """The part of v that f sees is there after one step, the other needs thousands."""
    curvature = torch.tensor([1.0, 1e-3])
    g = lambda u, v: (curvature * (v - u).square()).sum() / 2  # noqa: E731
    f = lambda u, v: v[0].sin()  # noqa: E731
    options: dict[str, Any] = {"method": method, "step_size": 1.0, "lower_steps": 5}
    with pytest.warns(BilevelWarning, match="still move v by" if method == "reverse" else "raise"):
        _, info = hypergradient(f, g, torch.tensor([0.3]), torch.zeros(2), **options)
    assert not info.converged
    if method == "reverse":
        assert info.residual_norm < 1e-15


def hidden(u: Tensor, v: Tensor) -> Tensor:
    """2,000 hidden numbers per number of v."""
    return torch.tanh(torch.linspace(0, 1, 2000)[:, None] * v + u).square().mean()


def test_memory_of_reverse_is_that_of_the_iterates() -> None:
    u, v = torch.tensor(0.3), normal(20, seed=1)
    f = lambda u, v: v.square().sum()  # noqa: E731

    def run(steps: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            options = {"lower_steps": steps, "step_size": 0.1}
            hypergradient(f, hidden, u, v, method="reverse", **options)

    run(2)  # lazy set-up of torch
    few, many = peak_bytes(lambda: run(5)), peak_bytes(lambda: run(45))
    iterate = v.numel() * v.element_size()
    activation = 2000 * iterate
    assert few > 2 * activation  # the measurement sees graphs: one of them
    # 40 more iterates and 40 more 0-d losses, in blocks of 64 bytes.
    assert many - few <= 40 * (iterate + 64 + 64)

    def kept_graph() -> None:
        w = v.clone().requires_grad_()
        for _ in range(45):
            (r,) = torch.autograd.grad(hidden(u, w), w, create_graph=True)
            w = w - 0.1 * r
        f(u, w).backward()

    assert peak_bytes(kept_graph) > 10 * many  # 45 steps kept instead of one
