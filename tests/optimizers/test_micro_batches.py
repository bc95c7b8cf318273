"""Sequences of closures: the step is that of the joined batch."""

import pytest
import torch
from micro_batches import ENGINES, PENALTIES, Rows, joined

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer


def run(
    closures, parts=True, steps=6, dtype=torch.float64, make=PenaltyBilevelOptimizer, **options
):
    rows = Rows(dtype)
    optimizer = make(*rows.rules(), **options)
    torch.manual_seed(1)
    for _ in range(steps):
        closures(rows, optimizer, (lambda each: each) if parts else joined)
    return rows.state(optimizer), optimizer


def step(rows, optimizer, of):
    optimizer.step(of(rows.upper), of(rows.lower))


def halves(rows, optimizer, of):
    optimizer.lower_step(of(rows.upper), of(rows.lower))
    optimizer.upper_step(of(rows.upper), of(rows.lower))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("curvature", ENGINES)
def test_steps_are_those_of_the_joined_batch(curvature, penalty):
    """Dropout replays, BatchNorm moves once for each part, rows of u lie in one part or in none."""
    for how, options in ((step, {"lower_steps": 3}), (halves, {})):
        options |= {"curvature": curvature}
        (parts, _), (whole, optimizer) = (
            run(how, p, penalty=PENALTIES[penalty](), **options) for p in (True, False)
        )
        torch.testing.assert_close(parts, whole, rtol=0, atol=ENGINES[curvature])
        assert float(optimizer.metrics.upper_grad_norm) > 1e-3
        assert not parts[32:37].any()
        assert parts[:32].all()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_float32(penalty):
    how = {"curvature": "double_backward", "dtype": torch.float32}
    made = (run(step, p, penalty=PENALTIES[penalty](), **how) for p in (True, False))
    (parts, _), (whole, _) = made
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_float32_differences_differ_by_their_rounding():
    how = {"curvature": "finite_difference", "dtype": torch.float32}
    (parts, _), (whole, _) = (run(step, p, **how) for p in (True, False))
    torch.testing.assert_close(parts, whole, rtol=0, atol=3e-3)  # 1e-7 over a shift of 1e-4


def test_auto_decides_as_for_the_joined_batch():
    """In float32, beyond its first look; the second pass does not count as double backward's."""
    how = {"steps": 12, "dtype": torch.float32}
    (_, parts), (_, whole) = (run(step, p, **how) for p in (True, False))
    for optimizer in (parts, whole):
        assert "2." in optimizer.curvature.reason
        assert optimizer.curvature.in_use.name == "finite_difference"


def test_one_closure_in_a_sequence_is_that_closure():
    ends = []
    for wrap in (lambda c: c, lambda c: [c], lambda c: (c,)):
        rows = Rows(count=1)
        optimizer = PenaltyBilevelOptimizer(*rows.rules())
        for _ in range(3):
            optimizer.step(wrap(rows.upper[0]), wrap(rows.lower[0]))
        ends.append((rows.state(optimizer), optimizer.metrics.gradient_evaluations))
    assert all(torch.equal(e[0], ends[0][0]) and e[1] == ends[0][1] for e in ends)


def test_gradient_evaluations_are_counted():
    """A pass over all parts is one; double backward takes g once more for each product."""
    for curvature, per_product in {"double_backward": 2, "finite_difference": 2}.items():
        _, optimizer = run(step, steps=3, curvature=curvature)  # in float64 differences are central
        assert optimizer.metrics.gradient_evaluations == 3 * (2 + 2 * per_product)  # with a probe
    _, optimizer = run(step, steps=3, curvature="double_backward", penalty="value")
    assert optimizer.metrics.gradient_evaluations == 9


@pytest.mark.parametrize("curvature", ENGINES)
def test_closures_are_called_as_often_as_is_counted(curvature):
    calls = []
    rows = Rows()
    optimizer = PenaltyBilevelOptimizer(*rows.rules(), curvature=curvature)

    def counted(kind, closure):
        def call():
            calls.append(kind)
            return closure()

        return call

    both = [[counted(k, c) for c in cs] for k, cs in (("f", rows.upper), ("g", rows.lower))]
    for _ in range(3):
        calls.clear()
        before = optimizer.metrics.gradient_evaluations
        optimizer.step(*both)
    made = optimizer.metrics.gradient_evaluations - before
    products = 2 if curvature != "finite_difference" else 0  # taken from graphs already evaluated
    assert len(calls) == 4 * (made - products)


METHODS = {"cg": {"damping": 1.0}, "reverse": {}, "one_step": {}, "stochastic": {"step_size": 0.1}}


@pytest.mark.parametrize("method", METHODS)
def test_hypergradient_optimizer(method):
    how = {"make": HypergradientOptimizer, "method": method, "lower_steps": 2} | METHODS[method]
    (parts, _), (whole, optimizer) = (run(step, p, steps=3, **how) for p in (True, False))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)
    assert float(optimizer.metrics.upper_grad_norm) > 1e-3


def test_hypergradient_halves():
    how = {"make": HypergradientOptimizer, "steps": 3, "damping": 1.0}
    (parts, _), (whole, _) = (run(halves, p, **how) for p in (True, False))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)


def test_check_hypergradient():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    reports = []
    for of in (lambda each: each, joined):
        u, v = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = PenaltyBilevelOptimizer([u], [v])

        def f(i, v=v):
            return (x[i] @ v - y[i]).square().mean()

        def g(i, u=u, v=v):
            return (x[i] @ v - y[i]).cosh().mean() + (u.exp() * v.square()).sum()

        both = [[lambda i=i, h=h: h(i) for i in torch.arange(12).chunk(3)] for h in (f, g)]
        for _ in range(3):
            optimizer.step(*map(of, both))
        reports.append(optimizer.check_hypergradient(*map(of, both)))
    parts, whole = reports
    for name in ("cosine", "relative_error", "residual_norm", "adjoint_residual_norm"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)
        assert getattr(parts, name) > 1e-4
    torch.testing.assert_close(parts.exact, whole.exact, rtol=1e-9, atol=0)
    assert len(parts.slopes) == len(whole.slopes) > 0
    assert parts.repeats == "exactly"
