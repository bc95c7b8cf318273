"""Operations without a second derivative, or with a wrong one: refused, avoided, switched from."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from engines import ENGINES, LIVE, TOL, exact, filled_pair, products_of, relative_error
from networks import net_problem
from problems import join, normal
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torch_penalty_bilevel import BilevelWarning, DoubleBackwardError
from torch_penalty_bilevel.curvature import (
    Automatic,
    DoubleBackward,
    FiniteDifference,
    VectorJacobian,
)
from torch_penalty_bilevel.tensors import Pair

# What DoubleBackwardError must name.
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


def test_a_refusal_does_not_keep_the_graph() -> None:
    """From Python 3.12 on its cause held frames that held it, until garbage was collected."""
    problem = net_problem("transformer")

    def refused() -> weakref.ref[Tensor]:
        direction = problem.direction()
        try:  # pytest.raises keeps what is raised
            products_of(DoubleBackward(), problem, direction)
        except DoubleBackwardError:
            return weakref.ref(direction[0])
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        direction = refused()
        torch.ones(1, requires_grad=True).sum().backward()  # the engine drops what was left undone
        assert direction() is None
    finally:
        gc.enable()


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
def test_a_checkpoint_that_is_not_reentrant_is_differentiated(engine: str) -> None:
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


def test_a_compiled_forward_needs_finite_differences() -> None:
    torch.compiler.reset()  # other tests may have used up what is compiled of one forward
    problem = net_problem("mlp_tanh")
    problem.forward = torch.compile(problem.net, backend="aot_eager")
    product = products_of(FiniteDifference(), problem, problem.direction())
    assert relative_error(product.lower, exact("mlp_tanh").lower) < TOL["central"]
    with pytest.raises(DoubleBackwardError, match="compile"):
        products_of(DoubleBackward(), problem, problem.direction())
    with pytest.warns(BilevelWarning, match="torch.compile leaves no second derivative"):
        product = products_of(Automatic(), problem, problem.direction())
    assert relative_error(product.lower, exact("mlp_tanh").lower) < TOL["central"]
    torch.compiler.reset()


@pytest.mark.parametrize("engine", ["double_backward", "central"])
def test_products_of_a_sparse_embedding_in_closed_form(engine: str) -> None:
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
