"""Every engine's (J q, H q) against closed forms, full Hessians and each other."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    NetProblem,
    Quadratic,
    exact_products,
    join,
    leaves,
    net_problem,
    normal,
    spd,
    split,
)
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torch_penalty_bilevel import BilevelWarning, DoubleBackwardError, NondeterministicClosureError
from torch_penalty_bilevel.curvature import (
    Automatic,
    DoubleBackward,
    FiniteDifference,
    VectorJacobian,
    engine_point,
    resolve,
)
from torch_penalty_bilevel.tensors import OptionalPair, Pair, filled

ENGINES: dict[str, Callable[[], Any]] = {
    "double_backward": DoubleBackward,
    "auto": Automatic,
    "functional": VectorJacobian,
    "central": FiniteDifference,
    "forward": lambda: FiniteDifference(central=False),
}
EXACT = ("double_backward", "auto", "functional")
LIVE = ("double_backward", "auto", "central", "forward")

# Relative error of a product in float64. Exact engines: rounding. Differences of gradients with
# a relative step h carry rounding eps / h, here up to a factor 30 for the size of the gradient
# beside H q, and truncation: h^2 (central, 6e-6) or h (forward, 1e-7) times curvature's change.
TOL = {"double_backward": 1e-10, "auto": 1e-10, "functional": 1e-10, "central": 5e-9}
TOL["forward"] = 5e-6


def filled_pair(product: OptionalPair, at: Pair) -> Pair:
    return Pair(filled(product.upper, at.upper), filled(product.lower, at.lower))


def relative_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    a, b = join(actual).double(), join(expected).double()
    return float((a - b).norm() / b.norm())


def point_for(name: str, at: Pair) -> Pair:
    if name == "functional":  # no outer graph around torch.func's
        return Pair(tuple(t.detach() for t in at.upper), tuple(t.detach() for t in at.lower))
    return Pair(leaves(at.upper), leaves(at.lower))


def products_of(engine: Any, problem: NetProblem, direction: tuple[Tensor, ...]) -> Pair:
    loss = problem.pure if isinstance(engine, VectorJacobian) else problem.closure
    at = problem.at
    if isinstance(engine, VectorJacobian):
        at = Pair(tuple(t.detach() for t in at.upper), tuple(t.detach() for t in at.lower))
    return filled_pair(engine.linearise(loss, at).product(direction), at)


# The quadratic, in closed form.


@pytest.mark.parametrize("name", ENGINES)
def test_quadratic_products_residual_and_loss(name: str) -> None:
    problem = Quadratic.random()
    at = point_for(name, problem.point())
    direction = problem.direction()
    linearised = ENGINES[name]().linearise(problem.g, at, reusable=True)
    q = join(direction)
    # The gradient is linear, so differences have no truncation error: eps / h = 2e-9 for h = 1e-7
    # times the size of the gradient beside H q.
    tolerance = {"central": 1e-9, "forward": 5e-8}.get(name, 1e-10)
    for scale in (1.0, 1e-4, 1e4):  # the step is relative, so the length of q does not matter
        upper, lower = filled_pair(linearised.product(tuple(scale * d for d in direction)), at)
        assert relative_error(upper, (scale * problem.C @ q,)) < tolerance
        assert relative_error(lower, (scale * problem.A @ q,)) < tolerance
        assert [t.shape for t in upper] == [t.shape for t in at.upper]
        assert [t.shape for t in lower] == [t.shape for t in at.lower]
    assert_close(join(linearised.residual), problem.residual(at), rtol=1e-12, atol=1e-12)
    assert_close(linearised.loss, problem.g(*at).detach(), rtol=1e-14, atol=0)
    assert not linearised.loss.requires_grad
    assert not any(r.requires_grad for r in linearised.residual)


@pytest.mark.parametrize("name", ENGINES)
def test_quadratic_first_order(name: str) -> None:
    problem = Quadratic.random(seed=2)
    at = point_for(name, problem.point())
    engine = ENGINES[name]()
    value, gradient = engine.gradient(problem.f, at)
    assert_close(join(gradient.upper), problem.f_upper(at), rtol=1e-12, atol=1e-12)
    assert_close(join(gradient.lower), problem.f_lower(at), rtol=1e-12, atol=1e-12)
    assert_close(value, problem.f(*at).detach(), rtol=1e-14, atol=0)
    assert not value.requires_grad
    _, gradient = engine.gradient(problem.g, at)
    assert_close(join(gradient.upper), problem.g_upper(at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ENGINES)
def test_zero_direction_gives_zero(name: str) -> None:
    problem = Quadratic.random()
    at = point_for(name, problem.point())
    zero = tuple(torch.zeros_like(v) for v in at.lower)
    product = filled_pair(ENGINES[name]().linearise(problem.g, at).product(zero), at)
    assert join(product.upper).abs().max() == 0
    assert join(product.lower).abs().max() == 0


@pytest.mark.parametrize("name", LIVE)
def test_point_at_zero(name: str) -> None:
    """||v|| = 0 gives the relative step no length; it falls back to the step itself."""
    problem = Quadratic.random()
    at = Pair(leaves(problem.point().upper), leaves([torch.zeros(3), torch.zeros(2, 2)]))
    at = Pair(at.upper, leaves([v.double() for v in at.lower]))
    direction = problem.direction()
    _, lower = ENGINES[name]().linearise(problem.g, at).product(direction)
    assert relative_error(filled(lower, at.lower), (problem.A @ join(direction),)) < 1e-6


@pytest.mark.parametrize("name", LIVE)
def test_unused_entries(name: str) -> None:
    """Unused parameters: zero residual, no second derivative, the rest unharmed."""
    u, v, linear, unused = leaves([torch.ones(2), 2 * torch.ones(2), torch.ones(3), torch.ones(4)])
    ignored = torch.ones(1, requires_grad=True)
    at = Pair((u, ignored), (unused, v, linear))
    g = lambda *_: (u * v.pow(3)).sum() + 5 * linear.sum()  # noqa: E731
    linearised = ENGINES[name]().linearise(g, at)
    expected = (torch.zeros(4), 3 * torch.full((2,), 4.0), torch.full((3,), 5.0))
    for actual, wanted in zip(linearised.residual, expected, strict=True):
        assert_close(actual, wanted.to(actual.dtype), rtol=1e-6, atol=0)
    direction = tuple(torch.ones_like(p) for p in at.lower)
    upper, lower = linearised.product(direction)
    assert upper[1] is None
    assert lower[0] is None
    # J = 3 v^2 = 12, H = 6 u v = 12; float32 forward differences are right to 1e-3.
    product = filled_pair(OptionalPair(upper, lower), at)
    assert_close(product.upper[0], torch.full_like(u, 12), rtol=5e-3, atol=0)
    assert_close(product.lower[1], torch.full_like(v, 12), rtol=5e-3, atol=0)
    assert_close(product.lower[2], torch.zeros_like(linear), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["double_backward", "central"])
def test_linear_lower_loss_has_no_second_derivative(name: str) -> None:
    v = torch.ones(3, dtype=torch.float64, requires_grad=True)
    u = torch.ones(1, dtype=torch.float64, requires_grad=True)
    at = Pair((u,), (v,))
    linearised = ENGINES[name]().linearise(lambda *_: 2 * v.sum() + u.sum() ** 2, at)
    upper, lower = filled_pair(linearised.product((torch.ones_like(v),)), at)
    assert_close(upper[0], torch.zeros_like(u))
    assert_close(lower[0], torch.zeros_like(v))


vectors = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("name", ["double_backward", "functional", "central"])
@given(seed=vectors, a=st.floats(-3, 3), b=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_product_is_linear_and_symmetric(name: str, seed: int, a: float, b: float) -> None:
    problem = net_problem("mlp_gelu")
    p = problem.direction(seed=seed)
    q = problem.direction(seed=seed + 1000)
    engine = ENGINES[name]()
    combined = tuple(a * s + b * t for s, t in zip(p, q, strict=True))
    of_p, of_q, of_both = (products_of(engine, problem, d) for d in (p, q, combined))
    # Differences: h^2 truncation and eps / h rounding, relative to the size of the terms.
    scale = 1e-8 if name == "central" else 1e-12
    size = (1 + abs(a) + abs(b)) * float(join(of_p.lower).norm() + join(of_q.lower).norm())
    for left, right, both in (
        (of_p.upper, of_q.upper, of_both.upper),
        (of_p.lower, of_q.lower, of_both.lower),
    ):
        assert (a * join(left) + b * join(right) - join(both)).norm() < scale * size
    symmetric = join(p) @ join(of_q.lower) - join(q) @ join(of_p.lower)
    assert abs(symmetric) < scale * size * float(join(p).norm() + join(q).norm())


# Networks, against the full Hessian.

SMOOTH = ("mlp_tanh", "mlp_gelu", "mlp_relu", "cnn_groupnorm", "batchnorm")


@functools.cache
def exact(name: str) -> Pair:
    problem = net_problem(name)
    return exact_products(problem, problem.direction())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SMOOTH)
def test_networks(name: str, engine: str) -> None:
    problem = net_problem(name)
    if name == "batchnorm" and engine == "functional":  # torch.func cannot update statistics
        torch.func.replace_all_batch_norm_modules_(problem.net)
    upper, lower = products_of(ENGINES[engine](), problem, problem.direction())
    assert relative_error(upper, exact(name).upper) < TOL[engine]
    assert relative_error(lower, exact(name).lower) < TOL[engine]


@pytest.mark.parametrize("engine", LIVE)
def test_parameters_and_grad_are_untouched(engine: str) -> None:
    problem = net_problem("mlp_tanh")
    for i, parameter in enumerate((*problem.upper, *problem.lower)):
        parameter.grad = torch.full_like(parameter, float(i))
    before = [(p.detach().clone(), p.grad) for p in (*problem.upper, *problem.lower)]
    products_of(ENGINES[engine](), problem, problem.direction())
    for p, (value, grad) in zip((*problem.upper, *problem.lower), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is grad


@pytest.mark.parametrize("central", [True, False])
def test_restored_by_copy(central: bool) -> None:
    """Subtracting the shift again leaves a few entries in a thousand an ulp off."""
    v = normal(10_000, seed=1).float().requires_grad_()
    before = v.detach().clone()
    linearised = FiniteDifference(central=central).linearise(
        lambda *_: v.pow(4).sum(), Pair((), (v,))
    )
    linearised.product((normal(10_000, seed=2).float(),))
    assert torch.equal(v, before)


def test_parameters_are_restored_when_the_shifted_evaluation_raises() -> None:
    problem = net_problem("mlp_tanh")
    linearised = FiniteDifference().linearise(problem.closure, problem.at)
    before = [v.detach().clone() for v in problem.lower]
    problem.y = problem.y[:3]
    with pytest.raises(ValueError, match="batch_size"):
        linearised.product(problem.direction())
    assert all(torch.equal(v, b) for v, b in zip(problem.lower, before, strict=True))


@pytest.mark.parametrize("engine", LIVE)
def test_reusable_products(engine: str) -> None:
    problem = net_problem("mlp_tanh")
    linearised = ENGINES[engine]().linearise(problem.closure, problem.at, reusable=True)
    first = linearised.product(problem.direction())
    second = linearised.product(problem.direction())
    for a, b in zip((*first.upper, *first.lower), (*second.upper, *second.lower), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_graph_is_freed_unless_reusable() -> None:
    problem = net_problem("mlp_tanh")
    linearised = DoubleBackward().linearise(problem.closure, problem.at)
    linearised.product(problem.direction())
    with pytest.raises(DoubleBackwardError, match="already freed"):
        linearised.product(problem.direction())


def test_closure_that_called_backward_is_explained() -> None:
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        loss = v.pow(3).sum()
        loss.backward()
        return loss

    with pytest.raises(DoubleBackwardError, match=r"called backward\(\) itself"):
        DoubleBackward().gradient(closure, Pair((), (v,)))


def test_other_errors_pass_through() -> None:
    def closure(*_: Any) -> Tensor:
        raise RuntimeError("out of cheese")

    v = torch.ones(2, requires_grad=True)
    for engine in LIVE:
        with pytest.raises(RuntimeError, match="out of cheese") as caught:
            ENGINES[engine]().linearise(closure, Pair((), (v,)))
        assert not isinstance(caught.value, DoubleBackwardError)


# The step of the finite difference.

STEPS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@functools.cache
def rounded(net: str, dtype: torch.dtype) -> tuple[NetProblem, Pair]:
    """A network in ``dtype`` and its (J q, H q) in float64 at the same rounded point."""
    problem = net_problem(net, samples=32).cast(dtype)
    direction = tuple(d.double() for d in problem.direction())
    return problem, exact_products(problem.cast(torch.float64), direction)


def difference_error(net: str, dtype: torch.dtype, **options: Any) -> float:
    problem, truth = rounded(net, dtype)
    product = products_of(FiniteDifference(**options), problem, problem.direction())
    return relative_error((*product.upper, *product.lower), (*truth.upper, *truth.lower))


@pytest.mark.parametrize("net", ["mlp_tanh", "mlp_gelu", "cnn_groupnorm", "transformer"])
@pytest.mark.parametrize(
    ("dtype", "central", "worst"),
    # worst: what the default step reaches; measured 2e-4 to 8e-4, 2e-5 to 1.2e-4, 4e-2 to 7e-2.
    [
        (torch.float32, False, 2e-3),
        (torch.float32, True, 4e-4),
        (torch.bfloat16, True, 0.15),
    ],
)
def test_step_sits_at_the_bottom_of_the_error_curve(
    net: str, dtype: torch.dtype, central: bool, worst: float
) -> None:
    curve = [difference_error(net, dtype, relative_step=h, central=central) for h in STEPS]
    default = difference_error(net, dtype, central=central)
    best = min(curve)
    # V: rounding on the left, truncation on the right. On 16 bits both ends meet in the noise.
    assert curve[0] > 5 * best
    if dtype == torch.float32:
        assert curve[-1] > 5 * best
    assert default < 5 * best
    assert default < worst


@pytest.mark.parametrize(
    ("dtype", "central", "step"),
    [(torch.float32, False, 1e-4), (torch.float64, True, 6e-6), (torch.bfloat16, True, None)],
)
def test_default_scheme_by_dtype(dtype: torch.dtype, central: bool, step: float | None) -> None:
    """float32 takes the forward difference, 64 and 16 bits the central one."""
    calls: list[Tensor] = []
    v = torch.full((4,), 3.0, dtype=dtype, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        calls.append(v.detach().clone())
        return v.square().sum()

    engine = FiniteDifference()
    linearised = engine.linearise(closure, Pair((), (v,)))
    calls.clear()
    linearised.product((torch.full((4,), 7.0, dtype=dtype),))
    assert len(calls) == (2 if central else 1)
    assert engine.product_cost == (2 if central else 1)
    if step is not None:  # ||delta q|| = h ||v||, and v = 3 everywhere
        shift = calls[0].double() - 3
        assert_close(shift, torch.full((4,), 3 * step).double(), rtol=1e-2, atol=0)
    if central:
        assert_close(calls[0].double() - 3, 3 - calls[1].double(), rtol=1e-6, atol=0)


def test_coarsest_parameter_sets_the_step() -> None:
    """A float32 step would be rounded away in the bfloat16 parameter."""
    v = torch.ones(64, dtype=torch.float32, requires_grad=True)
    w = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    direction = (torch.ones_like(v), torch.ones_like(w))
    closure = lambda *_: v.pow(2).sum() + w.float().pow(2).sum()  # noqa: E731
    product = FiniteDifference().linearise(closure, Pair((), (v, w))).product(direction)
    # H = 2; bfloat16 carries 8 bits, so the shift and the difference are right to 10 %.
    assert_close(product.lower[0], torch.full_like(v, 2.0), rtol=0.1, atol=0)
    assert_close(product.lower[1], torch.full_like(w, 2.0), rtol=0.1, atol=0)


def test_relative_step_has_an_effect_and_is_checked() -> None:
    v = torch.ones(1, dtype=torch.float64, requires_grad=True)
    closure = lambda *_: v.pow(3).sum()  # noqa: E731
    engine = FiniteDifference(relative_step=0.1, central=False)
    _, lower = engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
    # (3 (1.1)^2 - 3) / 0.1 = 6.3 instead of 6.
    assert_close(filled(lower, (v,))[0], torch.full_like(v, 6.3))
    engine = FiniteDifference(relative_step=0.1, central=True)
    _, lower = engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
    assert_close(filled(lower, (v,))[0], torch.full_like(v, 6.0))
    for bad in (0.0, -1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="relative_step"):
            FiniteDifference(relative_step=bad)


# What closures do besides computing a loss.


@pytest.mark.parametrize("engine", ["central", "forward"])
def test_dropout_masks_replay(engine: str) -> None:
    problem = net_problem("dropout")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        truth = products_of(DoubleBackward(), problem, problem.direction())
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        product = products_of(ENGINES[engine](), problem, problem.direction())
        # From outside one evaluation has drawn numbers, not three.
        assert torch.equal(torch.get_rng_state(), drawn)
    assert relative_error(product.lower, truth.lower) < TOL[engine]
    assert relative_error(product.upper, truth.upper) < TOL[engine]


@pytest.mark.parametrize("engine", ["forward", "central"])
def test_autocast_cache_does_not_go_stale(engine: str) -> None:
    """Inside one autocast block torch caches the bfloat16 weights and misses the shift."""
    problem = net_problem("mlp_tanh", samples=32).cast(torch.float32)
    wide = problem.cast(torch.float64)
    truth = exact_products(wide, tuple(d.double() for d in problem.direction()))
    step = FiniteDifference(relative_step=0.05, central=engine == "central")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = products_of(step, problem, problem.direction())
        after = problem.closure()
    # bfloat16 activations (8 bits) over a step of 5 %: errors of 10 %; a stale cache gives 100 %.
    assert relative_error(product.upper, truth.upper) < 0.2
    assert relative_error(product.lower, truth.lower) < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(problem.closure(), after, rtol=0, atol=0)  # the shifted copy is gone too


def test_closure_that_draws_another_batch_is_refused() -> None:
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)
    batches = iter(normal(10, 2, seed=8))
    closure = lambda *_: (v * next(batches)).square().sum()  # noqa: E731
    at = Pair((), (v,))
    with pytest.raises(NondeterministicClosureError, match="draw the batch outside the closure"):
        FiniteDifference().linearise(closure, at)
    DoubleBackward().linearise(closure, at)  # evaluates once, so the batch is one batch


def test_closure_is_checked_once() -> None:
    calls = 0
    v = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def closure(*_: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return v.square().sum()

    engine = FiniteDifference(central=False)
    counts = []
    for _ in range(2):
        calls = 0
        engine.linearise(closure, Pair((), (v,))).product((torch.ones_like(v),))
        counts.append(calls)
    assert counts == [3, 2]


# Operations without a second derivative. TRAPS: what DoubleBackwardError must name.

TRAPS = {
    "transformer": "_scaled_dot_product_flash_attention_for_cpu_backward",
    "weight_norm": "weight_norm",
    "once_differentiable": "OnceCube",
}


@pytest.mark.parametrize("name", TRAPS)
def test_double_backward_names_the_operation_and_the_remedy(name: str) -> None:
    problem = net_problem(name)
    with pytest.raises(DoubleBackwardError, match=TRAPS[name]) as caught:
        products_of(DoubleBackward(), problem, problem.direction())
    assert 'curvature="finite_difference"' in str(caught.value)


@pytest.mark.parametrize("name", ["transformer", "weight_norm"])
def test_functional_names_the_operation_too(name: str) -> None:
    """weight_norm under torch.func used to return an H q that was wrong by 32 %."""
    problem = net_problem(name)
    with pytest.raises(DoubleBackwardError, match=TRAPS[name]):
        products_of(VectorJacobian(), problem, problem.direction())


@pytest.mark.parametrize("name", [*TRAPS, "custom_function"])
def test_finite_difference_needs_no_second_derivative(name: str) -> None:
    problem = net_problem(name)
    product = products_of(FiniteDifference(), problem, problem.direction())
    assert relative_error(product.upper, exact(name).upper) < TOL["central"]
    assert relative_error(product.lower, exact(name).lower) < TOL["central"]


@pytest.mark.parametrize("name", [*TRAPS, "custom_function"])
def test_auto_switches_with_one_warning(name: str) -> None:
    problem = net_problem(name)
    engine = Automatic()
    assert not engine.switched
    with pytest.warns(BilevelWarning, match="switched to finite differences") as record:
        product = products_of(engine, problem, problem.direction())
    assert len(record) == 1
    again = products_of(engine, problem, problem.direction())  # warnings are errors here
    assert engine.switched
    assert engine.product_cost == 2
    for result in (product, again):
        assert relative_error(result.upper, exact(name).upper) < TOL["central"]
        assert relative_error(result.lower, exact(name).lower) < TOL["central"]


def test_auto_switches_for_later_products_of_the_same_linearisation() -> None:
    """The first difference moves v and back, which torch forbids the abandoned graph to outlive."""
    problem = net_problem("transformer")
    linearised = Automatic().linearise(problem.closure, problem.at, reusable=True)
    with pytest.warns(BilevelWarning, match="switched to finite differences") as record:
        first, second = (
            filled_pair(linearised.product(problem.direction()), problem.at) for _ in range(2)
        )
    assert len(record) == 1
    assert_close(join(first.lower), join(second.lower), rtol=0, atol=0)


def test_auto_replays_random_numbers_when_it_switches() -> None:
    """The residual it returned and the product it makes after the switch share the masks."""
    problem = net_problem("dropout")
    problem.net[1] = torch.nn.Hardsigmoid()  # no second derivative, found out in the product
    state = torch.get_rng_state()
    with pytest.warns(BilevelWarning, match="hardsigmoid"):
        product = products_of(Automatic(), problem, problem.direction())
    torch.set_rng_state(state)
    expected = products_of(FiniteDifference(), problem, problem.direction())
    # Hardsigmoid has kinks, but both differences cross the same ones.
    assert_close(join(product.lower), join(expected.lower), rtol=1e-12, atol=1e-12)
    assert_close(join(product.upper), join(expected.upper), rtol=1e-12, atol=1e-12)


def test_auto_settles_on_double_backward() -> None:
    problem = net_problem("mlp_tanh")
    engine = Automatic()
    products_of(engine, problem, problem.direction())
    assert not engine.switched
    assert engine.product_cost == 1


def test_custom_function_is_the_users_word_with_double_backward() -> None:
    problem = net_problem("custom_function")
    product = products_of(DoubleBackward(), problem, problem.direction())
    assert relative_error(product.lower, exact("custom_function").lower) < 1e-10


def test_weight_norm_is_what_it_is_refused_for() -> None:
    """Should torch repair weight_norm, this fails and the refusal can go."""
    problem = net_problem("weight_norm")
    engine = DoubleBackward()
    engine._inspected = True
    product = products_of(engine, problem, problem.direction())
    assert relative_error(product.lower, exact("weight_norm").lower) > 0.1


@pytest.mark.parametrize("engine", LIVE)
def test_checkpoint(engine: str) -> None:
    problem = net_problem("mlp_tanh")
    problem.forward = lambda x: checkpoint(problem.net, x, use_reentrant=False)
    product = products_of(ENGINES[engine](), problem, problem.direction())
    assert relative_error(product.lower, exact("mlp_tanh").lower) < TOL[engine]


@pytest.mark.parametrize("engine", ["double_backward", "central", "forward"])
@pytest.mark.parametrize("method", ["linearise", "gradient"])
def test_reentrant_checkpoint_is_refused(engine: str, method: str) -> None:
    """autograd.grad does not see parameters inside it: H q used to be wrong by 80 to 99 %."""
    problem = net_problem("mlp_tanh")
    body, head = problem.net[:2], problem.net[2]
    x = problem.x.clone().requires_grad_()
    problem.forward = lambda _: head(checkpoint(body, x, use_reentrant=True))
    with pytest.raises(DoubleBackwardError, match="use_reentrant=False"):
        getattr(ENGINES[engine](), method)(problem.closure, problem.at)


def test_compiled_forward() -> None:
    problem = net_problem("mlp_tanh")
    problem.forward = torch.compile(problem.net, backend="aot_eager")
    product = products_of(FiniteDifference(), problem, problem.direction())
    assert relative_error(product.lower, exact("mlp_tanh").lower) < TOL["central"]
    with pytest.raises(DoubleBackwardError, match="compile"):
        products_of(DoubleBackward(), problem, problem.direction())
    with pytest.warns(BilevelWarning, match="CompiledFunction"):
        product = products_of(Automatic(), problem, problem.direction())
    assert relative_error(product.lower, exact("mlp_tanh").lower) < TOL["central"]
    torch.compiler.reset()


@pytest.mark.parametrize("engine", ["double_backward", "central"])
def test_sparse_embedding(engine: str) -> None:
    """g = sum_i s(u_i) |E_{k_i} - 1|^2 / 2: H is diagonal with the weights of a row's samples."""
    table = torch.nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    rows = torch.tensor([1, 3, 3])
    u = normal(3, seed=1).requires_grad_()
    at = Pair((u,), (table.weight,))

    def closure(*_: Any) -> Tensor:
        return (u.sigmoid() * (table(rows) - 1).square().sum(1)).sum() / 2

    q = normal(5, 3, seed=2)
    linearised = ENGINES[engine]().linearise(closure, at, reusable=True)
    share = u.detach().sigmoid()
    weights = torch.zeros(5, dtype=torch.float64).index_add(0, rows, share)
    slope = share * (1 - share)
    errors = table.weight.detach()[rows] - 1
    for direction in (q, linearised.residual[0]):  # dense and sparse
        dense = direction.to_dense()
        upper, lower = filled_pair(linearised.product((direction,)), at)
        assert_close(lower[0].to_dense(), weights[:, None] * dense, rtol=1e-8, atol=1e-8)
        assert_close(upper[0], slope * (errors * dense[rows]).sum(1), rtol=1e-8, atol=1e-8)


# Choosing by name.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", Automatic),
        ("double_backward", DoubleBackward),
        ("finite_difference", FiniteDifference),
        ("functional", VectorJacobian),
    ],
)
def test_resolve(name: str, kind: type) -> None:
    assert type(resolve(name)) is kind
    ready = kind()
    assert resolve(ready) is ready


def test_resolve_refuses() -> None:
    with pytest.raises(ValueError, match="got 'hessian'"):
        resolve("hessian")
    for bad in (FiniteDifference, 3):
        with pytest.raises(TypeError, match="FiniteDifference"):
            resolve(bad)  # type: ignore[arg-type]


def test_no_engine_warns_when_all_is_well() -> None:
    problem = Quadratic.random()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, build in ENGINES.items():
            at = point_for(name, problem.point())
            build().linearise(problem.g, at).product(problem.direction())


def test_splitting_a_parameter_changes_nothing() -> None:
    matrix, vector = spd(6, seed=9), normal(6, seed=10)
    q = normal(6, seed=12)
    for shapes in (((6,),), ((2,), (1, 4)), ((1,), (2, 2), (1,))):
        v = leaves(split(vector, shapes))
        closure = lambda *_, v=v: join(v) @ matrix @ join(v) / 2  # noqa: E731
        for name in LIVE:
            linearised = ENGINES[name]().linearise(closure, Pair((), v))
            _, lower = linearised.product(split(q, shapes))
            assert relative_error(filled(lower, v), (matrix @ q,)) < 5e-8, name


@pytest.mark.parametrize("engine", [DoubleBackward(), VectorJacobian(), Automatic()])
def test_both_products_of_a_map(engine) -> None:
    """(dr/dv)'q, (dr/du)'q and (dr/dv) w of r = v - Phi against dense Jacobians."""
    W, u, v = normal(4, 4, seed=1), normal(3, seed=2), normal(4, seed=3)
    phi = lambda u, v: torch.tanh(W @ v + u.sum() * v.square() + u[0])  # noqa: E731
    at = engine_point(engine, Pair(*(leaves((t,)) for t in (u, v))))
    made = engine.linearise_map(lambda u, v: (phi(u[0], v[0]),), at, reusable=True)
    B = torch.eye(4) - torch.func.jacrev(phi, argnums=1)(u, v)
    E = -torch.func.jacrev(phi, argnums=0)(u, v)
    for seed in (4, 5):  # reusable, in any order
        q = normal(4, seed=seed)
        upper, lower = made.product((q,))
        assert_close(lower[0], B.T @ q, rtol=1e-12, atol=1e-13)
        assert_close(upper[0], E.T @ q, rtol=1e-12, atol=1e-13)
        assert made.transposed is not None
        assert_close(made.transposed((q,))[0].detach(), B @ q, rtol=1e-12, atol=1e-13)
