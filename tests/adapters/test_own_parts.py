"""A penalty, a rule or an engine that was written wrong: the error says what to write."""

import random as python_random
from dataclasses import dataclass

import pytest
import torch

from examples.extending.engine import Dense
from examples.extending.multiplier_rule import HeavyBall, HeavyBallState
from examples.extending.penalty import Regularised
from torch_penalty_bilevel import (
    HypergradientOptimizer,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.curvature import Curvature
from torch_penalty_bilevel.multipliers import DualState, MultiplierRule
from torch_penalty_bilevel.tensors import OptionalPair, Tensors


def leaves():
    return [torch.zeros(2, requires_grad=True)], [torch.zeros(3, requires_grad=True)]


def built(**options):
    return PenaltyBilevelOptimizer(*leaves(), **options)


# Rules.


class Bare(MultiplierRule):
    shares_evaluation = True

    def adjoint(self, state, residual):
        return state.multiplier


class Alone:
    """Offers lower_update, and nothing of what MultiplierRule has a default for."""

    def lower_update(self, state, evaluation, norms):
        return evaluation.residual, state


class Unextended(HeavyBall):
    def start(self, lower):
        return HeavyBallState(damping=1.0)


class Nothing(HeavyBall):
    def start(self, lower):
        return None


class OneTensor(HeavyBall):
    def lower_update(self, state, evaluation, norms):
        direction, after = super().lower_update(state, evaluation, norms)
        return direction, after.but(multiplier=after.multiplier[0])


@dataclass(frozen=True, eq=False)
class LooseState(DualState):
    velocity: Tensors = ()


class Loose(HeavyBall):
    def start(self, lower):
        return LooseState.at(lower)


class OneValue(HeavyBall):
    def lower_update(self, state, evaluation, norms):
        return super().lower_update(state, evaluation, norms)[1]


class Joined(HeavyBall):
    def lower_update(self, state, evaluation, norms):
        direction, after = super().lower_update(state, evaluation, norms)
        return torch.cat([d.reshape(-1) for d in direction]), after


class Forgetful(HeavyBall):
    def upper_update(self, state, evaluation, norms):
        state.but(weight=1.0)


class TensorAdjoint(HeavyBall):
    def adjoint(self, state, residual):
        return state.multiplier[0]


class Reshaped(HeavyBall):
    def start(self, lower):
        state = super().start(lower)
        return state.but(multiplier=tuple(m.reshape(-1) for m in state.multiplier))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Bare, r"the rule Bare lacks \['start', 'lower_update'\]; write them"),
        (
            Alone,
            r"the rule Alone lacks \['shares_evaluation', 'reads_residual', 'start'",
        ),
        (Unextended, r"HeavyBallState whose multiplier has 0 entries for . .*HeavyBallState.at\("),
        (Nothing, r"Nothing.start returned NoneType for the state; it is a .*DualState"),
        (OneTensor, r"lower_update returned .* multiplier is a tensor of shape .*it is a tuple"),
        (Loose, r"'velocity' of LooseState holds tuple\(\); .* velocity: Tensors = along\(ZEROS\)"),
        (OneValue, r"OneValue.lower_update returned HeavyBallState; return two: the gradient"),
        (Joined, r"the direction of Joined.lower_update is a tensor of shape \(6,\); it is to be"),
        (Forgetful, r"Forgetful.upper_update returned NoneType for the state"),
        (TensorAdjoint, r"TensorAdjoint.adjoint returned is a tensor of shape \(3,\)"),
        (
            Reshaped,
            r"Reshaped.start returned .* multiplier is tuple\(.*here of shapes \[\(3,\), \(",
        ),
    ],
)
def test_of_a_rule(rule, told):
    with pytest.raises(TypeError, match=told):
        built(penalty=Stationarity(rule()))


# Penalties.


class Void(Regularised):
    def evaluate(self, losses, at, state, curvature, reduce):
        super().evaluate(losses, at, state, curvature, reduce)


class Swapped(Regularised):
    def evaluate(self, losses, at, state, curvature, reduce):
        found = super().evaluate(losses, at, state, curvature, reduce)
        return found._replace(residual=found.upper_grad)


class Short(Regularised):
    def evaluate(self, losses, at, state, curvature, reduce):
        found = super().evaluate(losses, at, state, curvature, reduce)
        return found._replace(upper_grad=found.upper_grad[:1])


class Half:
    name = "half"

    def evaluate(self, losses, at, state, curvature, reduce):
        raise AssertionError


@pytest.mark.parametrize(
    ("penalty", "told"),
    [
        (
            Half(),
            r"Half lacks \['lower_is_map', 'takes_lower_constraints', 'rule'\]; see penalties",
        ),
        (Void(1.0), r"penalty=Void.evaluate returned NoneType; return an .*evaluate_residual"),
        (Swapped(1.0), r"the residual of penalty=Swapped.evaluate is tuple\(a tensor .*shapes"),
        (Short(1.0), r"the upper_grad of penalty=Short.evaluate is tuple\(a tensor of shape \(2,"),
    ],
)
def test_of_a_penalty(penalty, told):
    with pytest.raises(TypeError, match=told):
        built(penalty=penalty)


# Engines.


class OnlyGradient(Curvature):
    name = "only gradient"
    gradient = Dense.gradient


class Nameless(Curvature):
    gradient, linearise = Dense.gradient, Dense.linearise


class Flat(Dense):
    def gradient(self, loss, at):
        value, parts = super().gradient(loss, at)
        return value, (*parts.upper, *parts.lower)


class Lossless(Dense):
    def gradient(self, loss, at):
        return super().gradient(loss, at)[1]


class Unlinear(Dense):
    def linearise(self, loss, at, *, reusable=False):
        return super().linearise(loss, at).residual


class Product(Dense):
    def __init__(self, change):
        self.change = change

    def linearise(self, loss, at, *, reusable=False):
        made = super().linearise(loss, at)
        return made._replace(product=lambda q: self.change(made.product(q)))


class FlatResidual(Dense):
    def linearise(self, loss, at, *, reusable=False):
        made = super().linearise(loss, at)
        return made._replace(residual=torch.cat([r.reshape(-1) for r in made.residual]))


ENGINES = [
    (OnlyGradient(), r"curvature=OnlyGradient lacks \['linearise'\]; write them"),
    (Nameless(), r"curvature=Nameless lacks \['name'\]"),
    (Flat(), r"Flat.gradient returned tuple\(a tensor .*; return OptionalPair\(upper, lower\)"),
    (Lossless(), r"Lossless.gradient returned OptionalPair\(.*return the detached loss and"),
    (Unlinear(), r"Unlinear.linearise returned tuple\(.*return curvature.Linearised\("),
    (Product(lambda p: OptionalPair(p.lower, p.upper)), "Product.linearise .* levels swapped"),
    (Product(lambda p: (*p.upper, *p.lower)), r"the product of .* returned tuple\(a tensor"),
    (Product(lambda p: OptionalPair(p.upper[:1], p.lower)), "the upper part of what the product"),
    (FlatResidual(), r"the residual of curvature=FlatResidual.linearise is a tensor of shape"),
]


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
@pytest.mark.parametrize(("engine", "told"), ENGINES)
def test_of_an_engine(kind, engine, told):
    with pytest.raises(TypeError, match=told):
        kind(*leaves(), curvature=engine)


# What is right.


class Particular(Dense):
    """Serves one problem only."""

    def linearise(self, loss, at, *, reusable=False):
        if at.lower[0].shape != (4,):
            raise RuntimeError("not my network")
        return super().linearise(loss, at)


def test_what_fails_on_the_small_problem_alone_is_not_told():
    assert isinstance(built(curvature=Particular()).curvature, Particular)


class Counting(HeavyBall):
    def __init__(self):
        super().__init__()
        self.calls = []

    def lower_update(self, state, evaluation, norms):
        self.calls.append(torch.rand(1))
        python_random.random()
        return super().lower_update(state, evaluation, norms)


def test_the_trial_leaves_no_trace():
    rule, before = Counting(), (torch.get_rng_state(), python_random.getstate())
    with torch.no_grad():
        built(penalty=Stationarity(rule))
    assert rule.calls == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert python_random.getstate() == before[1]


def test_built_in_parts_are_not_tried(monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(LeastSquares, "lower_update", never)
    for name in ("stationarity", "value"):
        built(penalty=name)
    assert isinstance(built(penalty="paper")._dual, DualState)
