"""The same hypergradients by other libraries, in float32, and a published run of one of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from torch_penalty_bilevel import BilevelWarning, HypergradientOptimizer
from torch_penalty_bilevel.functional import hypergradient

ROWS, COLUMNS = 60, 5
STEP = 0.5


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


class Classification:
    """Logistic regression with one ridge weight per feature, lower and validation rows."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(3)
        weights = torch.randn(COLUMNS, generator=source)
        self.X = torch.randn(2 * ROWS, COLUMNS, generator=source)
        noise = torch.randn(2 * ROWS, generator=source)
        self.y = (self.X @ weights + noise > 0).float()
        self.u = torch.randn(COLUMNS, generator=source) - 2
        self.start = torch.zeros(COLUMNS)

    def f(self, u: Tensor, v: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(self.X[ROWS:] @ v, self.y[ROWS:])

    def g(self, u: Tensor, v: Tensor) -> Tensor:
        fit = binary_cross_entropy_with_logits(self.X[:ROWS] @ v, self.y[:ROWS])
        return fit + (u.exp() * v.square()).sum() / 2

    def descended(self, steps: int) -> Tensor:
        v = self.start
        for _ in range(steps):
            v = v - STEP * torch.func.grad(self.g, argnums=1)(self.u, v)
        return v


def ours(problem: Classification, v: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        return hypergradient(problem.f, problem.g, problem.u, v, **options)[0]


def by_torchopt(problem: Classification, v: Tensor, solve: Any) -> Tensor:
    torchopt = pytest.importorskip("torchopt")

    @torchopt.diff.implicit.custom_root(
        lambda w, u: torch.func.grad(problem.g, argnums=1)(u, w), argnums=1, solve=solve(torchopt)
    )
    def solution(start: Tensor, u: Tensor) -> Tensor:
        return start.detach().clone().requires_grad_()

    u = problem.u.clone().requires_grad_()
    problem.f(u, solution(v, u)).backward()
    assert u.grad is not None
    return u.grad


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_implicit_by_conjugate_gradients_is_that_of_torchopt() -> None:
    problem = Classification()
    v = problem.descended(300)
    theirs = by_torchopt(problem, v, lambda t: t.linear_solve.solve_cg(maxiter=50, atol=1e-7))
    assert_close(ours(problem, v, method="cg"), theirs, rtol=1e-5, atol=1e-6)
    assert float(theirs.norm()) > 1e-2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("terms", [1, 5, 30])
def test_neumann_series_is_that_of_torchopt(terms: int) -> None:
    problem = Classification()
    v = problem.descended(300)
    solve = lambda t: t.linear_solve.solve_inv(ns=True, maxiter=terms, alpha=STEP)  # noqa: E731
    theirs = by_torchopt(problem, v, solve)
    series = ours(problem, v, method="neumann", max_iterations=terms, step_size=STEP)
    assert_close(series, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_unrolled_is_that_of_higher(steps: int) -> None:
    higher = pytest.importorskip("higher")
    problem = Classification()
    model = torch.nn.Linear(COLUMNS, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    u = problem.u.clone().requires_grad_()
    rule = torch.optim.SGD(model.parameters(), lr=STEP)
    with higher.innerloop_ctx(model, rule, copy_initial_weights=False) as (copy, inner):
        for _ in range(steps):
            inner.step(problem.g(u, copy.weight[0]))
        (theirs,) = torch.autograd.grad(problem.f(u, copy.weight[0]), u)
    for method in ("reverse", "forward"):
        unrolled = ours(problem, problem.start, method=method, lower_steps=steps, step_size=STEP)
        assert_close(unrolled, theirs, rtol=1e-5, atol=1e-6)


# hypertorch's published notebook examples/logistic_regression.ipynb: 20 L2 weights for 500 rows.
INNER_LOSSES = {0: 0.6931472, 10: 0.6285591, 20: 0.6243906, 99: 0.6240898}
VALIDATION_LOSSES = {
    0: 0.5743990, 10: 0.5337679, 20: 0.3615219, 30: 0.3225043, 40: 0.2987646, 50: 0.2944670
}  # fmt: skip


def notebook_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gaussian rows, labels by a random plane with noise, numpy's seed 1, half for validation."""
    np = pytest.importorskip("numpy")
    selection = pytest.importorskip("sklearn.model_selection")
    np.random.seed(1)
    plane, x = np.random.randn(20), np.random.randn(1000, 20)
    y = (x @ plane + 0.1 * np.random.randn(1000) > 0).astype(float)
    parts = selection.train_test_split(x, y, test_size=0.5)
    return tuple(torch.from_numpy(part).float() for part in parts)  # type: ignore[return-value]


@pytest.mark.long
def test_the_run_published_with_hypertorch() -> None:
    """100 lower steps from zero, reverse mode through the last 10, SGD with momentum on u."""
    x, x_valid, y, y_valid = notebook_data()

    def f(u: Tensor, v: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x_valid @ v, y_valid)

    def g(u: Tensor, v: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x @ v, y) + (u * v.square()).sum() / 2

    u = torch.ones(20, requires_grad=True)
    w = torch.zeros(20, requires_grad=True)
    v = torch.zeros(20)
    for step in range(100):
        if step in INNER_LOSSES:
            # Seven digits are published; sums in another order change the last one or two.
            assert float(g(u.detach(), v)) == pytest.approx(INNER_LOSSES[step], abs=1e-6)
        v = v - 0.1 * torch.func.grad(g, argnums=1)(u.detach(), v)
    optimizer = HypergradientOptimizer(
        torch.optim.SGD([u], lr=1.0, momentum=0.9),
        torch.optim.SGD([w], lr=0.1),
        method="reverse",
        lower_steps=100,
        truncation=10,
        warm_start=False,
    )
    seen = {}
    for outer in range(51):
        loss = optimizer.step(lambda: f(u, w), lambda: g(u, w))
        if outer in VALIDATION_LOSSES:
            seen[outer] = float(loss)
        with torch.no_grad():
            u.clamp_(min=1e-8)
    # Rounding in float32, carried through up to 50 steps with momentum.
    assert seen == pytest.approx(VALIDATION_LOSSES, abs=2e-5)
