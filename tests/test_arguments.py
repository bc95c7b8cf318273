"""Numbers and truth values of every public class and function: an error names the argument."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import torch_penalty_bilevel as tpb
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, constraints

U, V = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
PAIR = torch.tensor([1.0, 2.0])
NO_NUMBERS = [
    None,
    "x",
    [1.0],
    1 + 1j,
    PAIR,
    torch.tensor(0.05),
    True,
    math.nan,
    math.inf,
    -1.0,
    10**400,
]
NO_TRUTHS = [3, "x", "no", PAIR, torch.tensor(True), [True]]


def optimizer(**options):
    return PenaltyBilevelOptimizer([U], [V], **options)


def hypergradient_optimizer(**options):
    return tpb.HypergradientOptimizer([U], [V], **options)


def check(**options):
    return optimizer().check_hypergradient(
        lambda: (V - U).square().sum(), lambda: (V - 2 * U).square().sum(), **options
    )


def quadratic(u, v):
    return (v - u).square().sum()


def minimize(**options):
    return tpb.minimize(quadratic, quadratic, U.detach(), V.detach(), **options)


def hypergradient(**options):
    method = "neumann" if "step_size" in options else "cg"
    return tpb.functional.hypergradient(
        quadratic, quadratic, U.detach(), V.detach(), method=method, **options
    )


def inequality(**options):
    return constraints.Inequality(lambda: U, **options)


NUMBERS = [
    (optimizer, "certificate_tolerance", False),
    (optimizer, "upper_lr", True),
    (optimizer, "lower_lr", True),
    (hypergradient_optimizer, "upper_lr", True),
    (hypergradient_optimizer, "tolerance", True),
    (hypergradient_optimizer, "damping", True),
    (LeastSquares, "damping", False),
    (LeastSquares, "share", False),
    (LeastSquares, "ridge", False),
    (tpb.EpsilonTest, "weight", False),
    (tpb.EpsilonTest, "damping", False),
    (tpb.EpsilonTest, "tolerance", False),
    (tpb.EpsilonTest, "growth", False),
    (tpb.EpsilonTest, "decay", False),
    (tpb.ValueGap, "weight", False),
    (tpb.ValueGap, "growth", False),
    (tpb.FiniteDifference, "relative_step", True),
    (constraints.Ball, "radius", False),
    (inequality, "weight", False),
    (inequality, "rate", False),
    (check, "tolerance", True),
    (check, "damping", False),
    (minimize, "tolerance", False),
    (hypergradient, "tolerance", True),
    (hypergradient, "damping", True),
    (hypergradient, "step_size", True),
]
"""What takes a number, its name, and whether None stands for a choice of its own."""


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(m, n, x) for m, n, optional in NUMBERS for x in NO_NUMBERS if not (optional and x is None)],
)
def test_what_is_no_number_is_refused_by_name_value_and_remedy(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must ") as caught:
        make(**{name: value})
    text = str(caught.value)
    assert text.startswith((f"{name} must be a finite number >", f"{name} must lie in (0, 1"))
    assert f"got {value!r}; " in text
    assert not text.endswith("; ")


COUNTS = [
    (optimizer, "lower_steps"),
    (optimizer, "max_lower_steps"),
    (optimizer, "warmup_steps"),
    (hypergradient_optimizer, "lower_steps"),
    (check, "max_iterations"),
    (minimize, "max_evaluations"),
    (minimize, "restarts"),
    (hypergradient, "max_iterations"),
]


@pytest.mark.parametrize(("make", "name"), COUNTS)
@pytest.mark.parametrize("value", ["x", [1], 1 + 1j, PAIR, torch.tensor(2), True, 1.5, -1])
def test_what_is_no_count_is_refused_by_name_and_value(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= [01].*, got ") as caught:
        make(**{name: value})
    assert repr(value) in str(caught.value)


TRUTHS = [
    (optimizer, "allow_unused"),
    (hypergradient_optimizer, "allow_unused"),
    (hypergradient_optimizer, "lower_is_map"),
    (LeastSquares, "correct_lower"),
    (LeastSquares, "subspace"),
    (tpb.ValueGap, "relative"),
    (tpb.Stationarity, "independent_batches"),
    (tpb.FiniteDifference, "central"),
    (lambda **rows: constraints.Ball(1.0, **rows), "rows"),
]


@pytest.mark.parametrize(("make", "name"), TRUTHS)
@pytest.mark.parametrize("value", NO_TRUTHS)
def test_what_is_no_truth_value_is_refused(make, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be True") as caught:
        make(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [3, PAIR, "twice"])
def test_what_else_may_be_true_or_false(value):
    with pytest.raises(ValueError, match="warm_start must be True, False, "):
        hypergradient_optimizer(warm_start=value)
    with pytest.raises(ValueError, match="resolve must be True, False or None"):
        check(resolve=value)


@pytest.mark.parametrize("bad", [None, "x", 1j, torch.tensor(1j)])
def test_bounds_are_real(bad):
    with pytest.raises(TypeError, match=r"^low must be a number or a real tensor, got"):
        constraints.Box(bad, 1.0)
    with pytest.raises(TypeError, match=r"^high must be a number or a real tensor, got"):
        constraints.Box(0.0, bad)


def test_a_certificate_of_one_is_that_of_no_multiplier():
    for value in (1, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"lie in \(0, 1\), got .*; q = 0 has 1"):
            optimizer(certificate_tolerance=value)


@pytest.mark.parametrize("value", [1, np.float32(0.5), np.int64(1), 0.25])
def test_numbers_of_all_kinds_are_kept_as_floats(value):
    """A checkpoint holds them, and weights_only loads no others."""
    rule = LeastSquares(damping=value, share=value, ridge=value)
    assert [type(x) for x in (rule.damping, rule.share, rule.ridge)] == [float] * 3
    assert rule.share == float(value)
    assert type(tpb.EpsilonTest(decay=value).decay) is float
    made = optimizer(lower_steps="auto", certificate_tolerance=min(value, 0.5))
    assert type(made.certificate_tolerance) is float


def test_options_set_later_are_checked_or_refused():
    rule = LeastSquares()
    rule.share = 1
    assert type(rule.share) is float
    with pytest.raises(ValueError, match="share must be a finite number >= 0, got -1"):
        rule.share = -1
    assert rule.share == 1.0
    for name, value in (
        ("preconditioner", lambda vectors, power: vectors),
        ("subspace", False),
        ("correct_lower", True),
    ):
        with pytest.raises(
            AttributeError,
            match=rf"{name} is read at construction.*construct another LeastSquares\({name}=",
        ):
            setattr(rule, name, value)
    assert (rule.preconditioner, rule.subspace, rule.correct_lower) == (None, None, False)


def test_a_ridge_that_comes_later_meets_the_preconditioner():
    """It would be a share of the wrong norm."""
    rule = LeastSquares(preconditioner=lambda vectors, power: vectors)
    rule.ridge = 0.1
    u, v = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"ridge must be 0 with a preconditioner, got 0\.1"):
        PenaltyBilevelOptimizer([u], [v], penalty=tpb.Stationarity(rule)).step(
            lambda: v.sum(), lambda: (v - u).square().sum()
        )


def test_options_are_copied_and_pickled():
    rule = LeastSquares(damping=2.0, ridge=0.1, subspace=False)
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert (other.damping, other.ridge, other.subspace) == (2.0, 0.1, False)
        other.damping = 3.0
    assert rule.damping == 2.0
    assert rule.for_maps().subspace is False


def test_an_option_belongs_to_an_object():
    """Tools that walk a class see no value, and no error."""
    assert not hasattr(LeastSquares, "share")
    assert "share" in vars(LeastSquares)
