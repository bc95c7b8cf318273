"""Kinds of network under the engine that "auto" takes: the products, the hypergradient, the score.

Letters: u one weight per sample, v the network, q a multiplier, H = d2g/dv2, J = d2g/du dv.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from size import sized
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_penalty_bilevel import BilevelWarning, PenaltyBilevelOptimizer, functional
from torch_penalty_bilevel.curvature import DoubleBackward
from torch_penalty_bilevel.tensors import Pair

pytest.importorskip("sklearn")
from benchmarks.engine_choice.digits import Cleaning
from benchmarks.engine_choice.kinds import KINDS, twice_differentiable

WITH_KINKS = [kind for kind in KINDS if "ReLU" in kind or "hardswish" in kind]
TRIED = sized(
    ["MLP-LayerNorm-GELU", "MLP-BatchNorm-ReLU", "conv-BatchNorm-ReLU-pool", "attention-ReLU"],
    [*KINDS],
)
ENGINES = sized(["auto"], ["auto", "finite_difference"])
SMOOTH = sized(
    ["MLP-LayerNorm-GELU"],
    ["MLP-LayerNorm-GELU", "conv-GroupNorm-SiLU", "LSTM", "attention-GELU"],
)


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def cleaned(kind, engine, seed):
    run = Cleaning(kind, engine, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # attention is differentiated otherwise
        plain = engine == "double_backward"
        with twice_differentiable(kind) if plain else contextlib.nullcontext():
            for _ in range(sized(5, 20)):
                run.epoch()
    return run


def apart(found, exact):
    gap, length = (
        torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (found, exact)
    )
    return float((gap - length).norm() / length.norm())


@pytest.mark.parametrize("seed", range(sized(1, 5)))
@pytest.mark.parametrize("kind", TRIED)
def test_auto_wins_what_double_backward_wins(kind, seed):
    """By labels told right, of 1,000: over 20 seeds those of one engine spread by .01 to .02."""
    auto, exact = (cleaned(kind, engine, seed) for engine in ("auto", "double_backward"))
    assert auto.told_right > exact.told_right - 0.03
    assert float(auto.f().detach()) < 1.3 * float(exact.f().detach()) + 0.02
    if kind in WITH_KINKS:
        assert not auto.optimizer.curvature.switched
    _check_products(kind, auto, range(200))


@pytest.mark.parametrize(
    "kind", sized(["MLP-LayerNorm-GELU"], [k for k in KINDS if k not in WITH_KINKS])
)
def test_batches_of_one_leave_the_engine_right(kind):
    """Every third sample has no weight at all: its g is flat."""
    run = Cleaning(kind, "auto", seed=0)
    run.model.eval()  # BatchNorm has no statistics of one sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        for k in range(sized(60, 600)):
            i, weight = torch.tensor([k]), float(k % 3 > 0)
            run.optimizer.step(run.f, lambda i=i, weight=weight: weight * run.g(i))
    _check_products(kind, run, range(1))


def _check_products(kind, run, samples):
    """H q and J q of the engine in use against double backward of a twin in float64."""
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = run.in_float64()
    i = torch.tensor([*samples])
    at = Pair((run.u,), tuple(run.model.parameters()))
    exactly_at = Pair((twin.u,), tuple(twin.model.parameters()))
    q = tuple(t.detach() for t in run.optimizer.adjoint)
    engine = copy.deepcopy(run.optimizer.curvature)
    engine._looks = False
    found = engine.linearise(lambda *_: run.g(i), at).product(q)
    with twice_differentiable(kind):
        linearised = DoubleBackward().linearise(lambda *_: twin.g(i), exactly_at)
        exact = linearised.product(tuple(t.double() for t in q))
    # One per cent is what "auto" asks of a difference, on the batch at which it looked and not on
    # this one (worst seen: 1.04 per cent); the rest is float32.
    limit = 2e-2 if engine.switched else 1e-4
    assert apart(found.upper, exact.upper) < limit
    assert apart(found.lower, exact.lower) < limit


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_hypergradient_of_a_held_u_is_the_implicit_one(engine, kind):
    """v and q settle in the ball around the first v; torch.func solves the reference in float64."""
    run = Cleaning(kind, engine, seed=0)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names, i = [name for name, _ in run.model.named_parameters()], torch.arange(100)
    lower = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    run.optimizer = PenaltyBilevelOptimizer([run.u], lower, upper_lr=0.0, curvature=engine)

    first = [v.detach().clone() for v in run.model.parameters()]

    def pull(parameters):
        return sum((v - v0).square().sum() for v, v0 in zip(parameters, first, strict=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)
        for _ in range(sized(200, 1000)):
            run.optimizer.step(run.f, lambda: run.g(i) + pull(run.model.parameters()))

    twin, model = run.in_float64(), copy.deepcopy(run.model).double()
    called = lambda v: lambda x: torch.func.functional_call(model, v, x)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        exact, info = functional.hypergradient(
            lambda u, v: twin.using(u, called(v)).f(),
            lambda u, v: twin.using(u, called(v)).g(i) + pull(v.values()),
            twin.u.detach(),
            {n: v.detach() for n, v in zip(names, model.parameters(), strict=True)},
        )
    assert info.converged
    assert apart([run.u.grad], [exact]) < 0.02
