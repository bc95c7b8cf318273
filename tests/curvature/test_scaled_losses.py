"""16-bit arithmetic in the closures, with and without a factor on the losses; scalers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import NonFiniteError, PenaltyBilevelOptimizer


class Task:
    """Cleaning 32 samples; ``factor`` multiplies both losses."""

    def __init__(self, factor: float = 1.0, within: torch.dtype | None = None, **options) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).float()
        self.u = torch.zeros(32, dtype=torch.float32, requires_grad=True)
        self.x, self.y = torch.randn(48, 8).float(), torch.randint(0, 3, (48,))
        self.factor, self.within = factor, within
        rates = {"upper_lr": 0.05, "lower_lr": 0.01}
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u], self.net.parameters(), **{**rates, **options}
        )

    def _losses(self, rows: slice) -> Tensor:
        coarse = contextlib.nullcontext()
        if self.within is not None:
            coarse = torch.autocast("cpu", self.within)
        with coarse:
            return cross_entropy(self.net(self.x[rows]).float(), self.y[rows], reduction="none")

    def f(self) -> Tensor:
        return self.factor * self._losses(slice(32, 48)).mean()

    def g(self) -> Tensor:
        return self.factor * (self.u.sigmoid() * self._losses(slice(0, 32))).mean()

    def steps(self, count: int) -> Task:
        for _ in range(count):
            self.optimizer.step(self.f, self.g)
        return self


@pytest.mark.parametrize(
    ("engine", "tolerance"), [("double_backward", 2e-4), ("finite_difference", 5e-3)]
)
def test_one_factor_on_both_losses_changes_nothing(engine: str, tolerance: float) -> None:
    """nu = -(S H)^-1 S grad_v f; L, r and a scale alike, and Adam divides S out.

    A power of two, so that only Adam's eps (1e-8 beside gradients of 1e-3) and rounding are left,
    which a difference of float32 multiplies by 1 / h = 1e4.
    """
    plain, scaled = (Task(factor, curvature=engine).steps(15) for factor in (1.0, 1024.0))
    torch.testing.assert_close(scaled.u, plain.u, rtol=0, atol=tolerance)
    for one, other in zip(scaled.optimizer.adjoint, plain.optimizer.adjoint, strict=True):
        assert float((one - other).norm()) < 20 * tolerance * float(other.norm())


def test_a_factor_that_halves_after_an_overflow_is_the_scaler() -> None:
    """The recipe of the README for float16: what fails changes nothing, so it can be repeated."""
    task = Task(2.0**20, torch.float16, curvature="double_backward")
    taken = overflows = 0
    while taken < 10:
        before = [t.detach().clone() for t in (task.u, *task.net.parameters())]
        try:
            task.steps(1)
            taken += 1
        except NonFiniteError:
            now = (task.u, *task.net.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            task.factor /= 2
            overflows += 1
    assert overflows > 0
    twin = Task(curvature="double_backward").steps(10)
    moved = float(twin.u.detach().norm())
    assert float((task.u - twin.u).detach().norm()) < 0.1 * moved


def test_a_scaler_refuses_closures_and_a_step_without_them_says_what_is_missing() -> None:
    task = Task()
    scaler = torch.amp.GradScaler("cpu")
    loss = scaler.scale(task.g())
    loss.backward()
    before = [p.detach().clone() for p in (task.u, *task.net.parameters())]
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(task.optimizer, closure=task.f, lower_closure=task.g)
    with pytest.raises(TypeError, match="step needs two closures"):
        scaler.step(task.optimizer)
    now = (task.u, *task.net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
def test_weights_of_16_bits_have_an_adjoint_of_32_beside_their_float32_twin(engine: str) -> None:
    """v held, so that both look at the same point: v rounds to it."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        v = torch.randn(6).to(torch.bfloat16).to(dtype).requires_grad_()
        u = torch.zeros(6, requires_grad=True)
        stiff = torch.linspace(1, 3, 6)
        kind = engine if dtype == torch.bfloat16 else "double_backward"
        with pytest.warns(match="16 bits") if dtype == torch.bfloat16 else contextlib.nullcontext():
            optimizer = PenaltyBilevelOptimizer(
                [u], torch.optim.SGD([v], lr=0.0), upper_lr=0.0, curvature=kind
            )
        for _ in range(60):
            optimizer.step(
                lambda v=v: (v.double() - 1).square().sum(),
                lambda v=v, u=u, stiff=stiff: (stiff * (v.double() - u).square()).sum() / 2,
            )
        found.append((optimizer.adjoint[0].double(), optimizer.metrics.relative_certificate))
    (exact, small), (coarse, certificate) = found
    assert optimizer.adjoint[0].dtype == torch.float32
    assert small < 1e-4
    # Products are rounded to 16 bits (2^-9), a difference errs by 3e-2 (test_finite_difference).
    tolerance = 0.01 if engine == "double_backward" else 0.05
    assert certificate < tolerance
    assert float((coarse - exact).norm() / exact.norm()) < tolerance
