"""How often a step calls each closure, and what becomes of one that draws its own data."""

import itertools
import warnings

import pytest
import torch
from constrained import leaf
from torch import nn

from torch_penalty_bilevel import (
    BilevelWarning,
    HypergradientOptimizer,
    NondeterministicClosureError,
    PenaltyBilevelOptimizer,
)
from torch_penalty_bilevel.checks.first_look import FirstLook
from torch_penalty_bilevel.curvature import DoubleBackward
from torch_penalty_bilevel.penalties import Losses
from torch_penalty_bilevel.tensors import Pair

PENALTIES = ["stationarity", "paper", "value", "fixed_point"]


class Counted:
    """A small problem whose closures count their calls."""

    def __init__(self, curvature, penalty, **options):
        self.u, self.v = leaf([0.1, 0.2, 0.3]), leaf([1.0, 0.5, -0.5])
        self.pure, self.is_map = curvature == "functional", penalty == "fixed_point"
        self.f_calls = self.g_calls = 0
        self.optimizer = PenaltyBilevelOptimizer(
            [self.u], [self.v], curvature=curvature, penalty=penalty, **options
        )

    def point(self, levels):
        return [level[0] for level in levels] if self.pure else (self.u, self.v)

    def f(self, *levels):
        self.f_calls += 1
        u, v = self.point(levels)
        return (v - 2).square().sum() + 0.1 * u.sum()

    def g(self, *levels):
        self.g_calls += 1
        u, v = self.point(levels)
        return (0.5 * v + u,) if self.is_map else (v.tanh() - u).square().sum()

    def calls(self):
        """Of f and g in one step."""
        self.f_calls = self.g_calls = 0
        self.optimizer.step(self.f, self.g)
        return self.f_calls, self.g_calls


@pytest.mark.parametrize("lower_steps", [1, 3])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("curvature", ["double_backward", "auto", "functional"])
def test_each_evaluation_calls_each_closure_once(curvature, penalty, lower_steps):
    """The value gap calls g at a second point. "auto" also looks now and then."""
    counted = Counted(curvature, penalty, lower_steps=lower_steps)
    evaluations = lower_steps + (penalty == "paper")
    per_step = evaluations, evaluations * (2 if penalty == "value" else 1)
    if curvature == "auto":
        counted.optimizer.curvature._looks = False
    first = counted.calls()
    assert first == tuple(n + (curvature == "functional") for n in per_step)
    assert {counted.calls() for _ in range(25)} == {per_step}


@pytest.mark.parametrize("penalty", PENALTIES[:3])
def test_differences_repeat_the_lower_closure(penalty):
    """Central in float64: g at v, and on both sides of it for every product."""
    counted = Counted("finite_difference", penalty)
    counted.calls()
    seen = [counted.calls() for _ in range(24)]
    if penalty == "value":
        assert set(seen) == {(1, 2)}
    elif penalty == "paper":
        assert set(seen) == {(2, 6)}
    else:  # the first ten lower steps and every twentieth take a product with a probe too
        assert seen == [(1, 5)] * 9 + [(1, 3)] * 10 + [(1, 5)] + [(1, 3)] * 4


def shifted(counted, batch_of):
    """Closures that add a batch, asked for at every call."""

    def f():
        return counted.f() + (batch_of() * counted.v).sum()

    def g():
        value, batch = counted.g(), batch_of()
        return (value[0] + batch,) if counted.is_map else value + (batch * counted.v).sum()

    return f, g


@pytest.mark.parametrize("penalty", ["stationarity", "fixed_point"])
def test_a_loader_inside_gives_one_batch_per_evaluation(penalty):
    """And the run is that of the batches drawn outside."""
    batches = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    inside, outside = (Counted("double_backward", penalty) for _ in range(2))
    loader = iter(batches)
    for _ in range(20):
        inside.optimizer.step(*shifted(inside, lambda: next(loader)))
    assert next(loader, None) is None  # f and g drew twenty each
    for upper_batch, lower_batch in batches.reshape(20, 2, 3):
        f, _ = shifted(outside, lambda batch=upper_batch: batch)
        _, g = shifted(outside, lambda batch=lower_batch: batch)
        outside.optimizer.step(f, g)
    assert torch.equal(inside.u, outside.u)
    assert torch.equal(inside.v, outside.v)


@pytest.mark.parametrize("lower_steps", [1, 2])
@pytest.mark.parametrize(
    ("curvature", "penalty"),
    [
        *itertools.product(["finite_difference"], ["stationarity", "paper", "value"]),
        *itertools.product(["double_backward", "auto", "functional"], ["value"]),
    ],
)
def test_where_the_same_data_is_needed_a_loader_is_refused(curvature, penalty, lower_steps):
    counted, drawn = Counted(curvature, penalty, lower_steps=lower_steps), itertools.count(1)
    before = torch.cat([counted.u, counted.v]).detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # "functional" says it of pure functions
        with pytest.raises(NondeterministicClosureError, match="outside"):
            counted.optimizer.step(counted.f, lambda *levels: next(drawn) * counted.g(*levels))
    assert torch.equal(torch.cat([counted.u, counted.v]).detach(), before)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("penalty", ["stationarity", "paper"])
def test_a_pure_function_with_a_loader_inside_is_named(penalty, level):
    counted, drawn = Counted("functional", penalty), itertools.count(1)
    f, g = counted.f, counted.g
    if level == "upper":
        f = lambda *levels: next(drawn) * counted.f(*levels)  # noqa: E731
    else:
        g = lambda *levels: next(drawn) * counted.g(*levels)  # noqa: E731
    with pytest.warns(BilevelWarning, match=f"{level}_closure, called again .* outside"):
        counted.optimizer.step(f, g)
    counted.optimizer.step(f, g)  # said once


def test_an_upper_loader_beside_differences_is_named():
    counted, drawn = Counted("finite_difference", "stationarity"), itertools.count(1)
    with pytest.warns(BilevelWarning, match="upper_closure, called again"):
        counted.optimizer.step(lambda: next(drawn) * counted.f(), counted.g)


@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
@pytest.mark.parametrize("curvature", ["double_backward", "auto", "finite_difference"])
def test_the_first_look_changes_no_number(curvature, penalty):
    """A twin that looks at nothing takes the same steps and leaves the generators there too."""
    ends = []
    for looks in (True, False):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
        net, x, u = net.double(), torch.randn(6, 3).double(), leaf([0.0] * 6)
        optimizer = PenaltyBilevelOptimizer(
            [u], net.parameters(), curvature=curvature, penalty=penalty
        )
        optimizer._dependence.due = looks
        if not looks:
            optimizer._scope.knows = lambda *functions: True
        for _ in range(3):
            optimizer.step(
                lambda: net(x).square().mean(),  # noqa: B023
                lambda: (u.exp() * (net(x) - 1).square().squeeze(1)).mean(),  # noqa: B023
            )
        state = [*net.state_dict().values(), u.detach(), torch.get_rng_state()]
        ends.append([t.clone().double() for t in state])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_hooks_and_counters_see_every_evaluation_once():
    net, seen = nn.Linear(2, 1).double(), []
    net.register_forward_hook(lambda *_: seen.append(1))
    u, x = leaf([0.0] * 4), torch.ones(4, 2, dtype=torch.float64)
    optimizer = PenaltyBilevelOptimizer([u], net.parameters(), curvature="double_backward")
    for _ in range(5):
        optimizer.step(
            lambda: net(x).square().mean(),
            lambda: (u.exp() * (net(x) - 1).square().squeeze(1)).mean(),
        )
    assert len(seen) == 10


@pytest.mark.parametrize("method", ["cg_normal", "neumann", "one_step", "alternating"])
def test_hypergradient_methods_say_how_often(method):
    """T lower steps and one linearisation; f once; both once more in the first step."""
    counted = Counted("double_backward", "stationarity")
    counted.optimizer = HypergradientOptimizer(
        [counted.u], [counted.v], method=method, lower_steps=3
    )
    assert counted.calls() == (2, 5)
    assert counted.calls() == (1, 4)


def test_a_first_look_serves_only_the_point_it_was_taken_at():
    v = leaf([1.0, 2.0])
    losses = Losses(lambda u, v: v[0].sum(), lambda u, v: v[0].square().sum())
    look = FirstLook(losses, Pair((), (v,)), DoubleBackward())
    seen = [loss((), (v,)) for loss in (look.losses.upper, look.losses.lower)]
    look.open()
    assert look.losses.upper((), (v,)) is seen[0]
    assert look.losses.upper((), (v,)) is not seen[0]
    with torch.no_grad():
        v.mul_(2)
    assert look.losses.lower((), (v,)).item() == 20.0


@pytest.mark.parametrize(("engine", "count"), [("auto", 2), ("functional", 0)])
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_closures_with_arguments_belong_to_the_functional_engine(engine, count, level):
    """The count that the other engine wants."""
    u, v = leaf([0.0, 0.0]), leaf([0.0, 0.0])

    def loss(*_):
        return ((u if level == "lower" else v) - 1).square().sum()

    wrong = (lambda u, v: v.sum()) if count else (lambda: v.sum())
    optimizer = PenaltyBilevelOptimizer([u], [v], curvature=engine)
    with pytest.raises(
        TypeError, match=rf'the {level} level: .*"functional" they take \(upper, lo'
    ):
        optimizer.step(*((wrong, loss) if level == "upper" else (loss, wrong)))


def test_a_type_error_inside_a_closure_is_its_own():
    u, v = leaf([0.0]), leaf([0.0])
    with pytest.raises(TypeError, match=r"^unsupported operand"):
        PenaltyBilevelOptimizer([u], [v]).step(lambda: v.sum() + "1", lambda: (v - u).sum() ** 2)
