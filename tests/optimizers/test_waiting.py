"""``lower_steps="auto"``: u waits until the certificate is small."""

import copy
import warnings

import pytest
import torch
from stepping import build, closures, quadratic_f, quadratic_g, start

from torch_penalty_bilevel import PenaltyBilevelOptimizer


class Waiting:
    """An optimizer that counts calls of g, and of g with a differentiable u."""

    def __init__(self, **options):
        self.u, self.v, self.optimizer = build(*start(), upper_lr=0.02, lower_lr=0.05, **options)
        self.evaluations = 0

    def f(self):
        return quadratic_f(self.u, self.v)

    def g(self):
        self.evaluations += 1
        return quadratic_g(self.u, self.v)

    def step(self):
        """Evaluations of the step, and the relative certificate at its end."""
        before, at = self.evaluations, self.u.detach().clone()
        self.optimizer.step(self.f, self.g)
        assert not torch.equal(self.u, at)  # each call moves u once
        return self.evaluations - before, float(self.optimizer.metrics.relative_certificate)


@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-3])
def test_u_moves_where_the_certificate_allows_it(tolerance):
    run = Waiting(lower_steps="auto", certificate_tolerance=tolerance, curvature="double_backward")
    run.step()  # the first looks at what the losses depend on, too
    for _ in range(30):
        _, relative = run.step()
        assert relative <= tolerance


def test_a_smaller_tolerance_waits_longer_and_ends_nearer_to_the_exact_hypergradient():
    runs = [
        Waiting(lower_steps="auto", certificate_tolerance=t, curvature="double_backward")
        for t in (0.5, 1e-3)
    ]
    for run in runs:
        for _ in range(20):
            run.step()
    assert runs[0].evaluations < runs[1].evaluations


def test_only_the_evaluation_that_serves_u_is_differentiated_for_it(monkeypatch):
    """The last one; the first, too, where the call before ended certified."""
    run = Waiting(lower_steps="auto", certificate_tolerance=1e-3, curvature="double_backward")
    run.step()
    plain, asked = run.optimizer._evaluate, []

    def evaluate(losses, for_upper):
        asked.append(for_upper)
        return plain(losses, for_upper=for_upper)

    monkeypatch.setattr(run.optimizer, "_evaluate", evaluate)
    for _ in range(10):
        asked.clear()
        run.step()
        assert asked[-1]
        assert sum(asked) <= 0.5 * len(asked)


def test_it_gives_up_at_the_most_lower_steps():
    run = Waiting(
        lower_steps="auto",
        certificate_tolerance=1e-14,
        max_lower_steps=7,
        curvature="double_backward",
    )
    run.step()
    assert [run.step()[0] for _ in range(3)] == [7, 7, 7]


def test_where_nothing_has_to_be_waited_for_a_step_is_one_evaluation():
    """The certificate of the evaluation before says that this one may serve u at once."""
    run = Waiting(lower_steps="auto", certificate_tolerance=0.999, curvature="double_backward")
    run.step()
    assert [run.step()[0] for _ in range(3)] == [1, 1, 1]


def switched(**options):
    """f is a square, g an ill-conditioned one; (u, optimizer, step), step(on) counts g's calls."""
    scales, calls, active = torch.logspace(-2.5, 0, 6), 0, True
    u, v = torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], upper_lr=0.01, lower_lr=0.01, curvature="double_backward", **options
    )

    def f():
        return (v - 3).square().sum() / 2 if active else (v * 0).sum()

    def g():
        nonlocal calls
        calls += 1
        return (scales * (v - u).square()).sum() / 2

    def step(on):
        nonlocal calls, active
        calls, active = 0, on
        optimizer.step(f, g)
        return calls

    return u, optimizer, step


def test_where_f_goes_silent_u_waits_for_the_multiplier_to_go():
    """grad_v f = 0, so the hypergradient is 0, and q of before would give it 6.7 here.

    ||J q|| = ||H q|| as J = -H, so the certificate bounds it; once it is small it stays small, and
    a silence costs one evaluation per step.
    """
    _, optimizer, step = switched(lower_steps="auto", max_lower_steps=500)
    for _ in range(30):
        step(True)
    asked = float((parameters(optimizer.lower)[0].detach() - 3).norm())
    assert 1 < step(False) < 30
    assert float(optimizer.metrics.upper_grad_norm) < 0.05 * 1.01 * asked
    found = float(optimizer.metrics.adjoint_residual_norm)
    assert found > 0  # small will do
    assert float(optimizer.metrics.relative_certificate) == pytest.approx(found / asked, rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the hypergradient is zero
        assert [step(False) for _ in range(200)] == [1] * 200
    assert float(optimizer.metrics.relative_certificate) < 1e-6
    step(True)
    assert float(optimizer.metrics.relative_certificate) <= 0.05


def test_what_f_last_asked_for_outlives_a_checkpoint():
    """Else a resumed run would wait for another multiplier."""
    _, whole, step = switched(lower_steps="auto", max_lower_steps=500)
    for _ in range(30):
        step(True)
    _, fresh, resumed = switched(lower_steps="auto", max_lower_steps=500)
    for a, b in zip(parameters(whole), parameters(fresh), strict=True):
        b.data.copy_(a)
    fresh.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert whole._counts["slope"] > 1
    step(False)
    resumed(False)
    assert fresh.metrics.relative_certificate == whole.metrics.relative_certificate


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_warm_up_knows_silence_too():
    """u moves while q has nothing to go back from, and waits where it has."""
    u, optimizer, step = switched(warmup_steps=1000)
    step(False)
    assert float(optimizer.metrics.relative_certificate) == 0.0
    assert optimizer._counts["warmup_left"] == 999
    before = u.detach().clone()
    while optimizer._counts["warmup_left"]:
        assert torch.equal(u, before)
        before = u.detach().clone()
        step(True)
    assert not torch.equal(u, before)  # in the very step that finds q ready
    u, optimizer, step = switched(warmup_steps=1000)
    for _ in range(3):
        step(True)
    assert optimizer._counts["warmup_left"]
    before = u.detach().clone()
    step(False)
    assert float(optimizer.metrics.adjoint_residual_norm) > 0
    rough = float(optimizer.metrics.relative_certificate) > 0.5
    assert torch.equal(u, before) == rough


@pytest.mark.parametrize("name", ["lower_steps", "max_lower_steps"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True, None])
def test_options_set_later_are_checked_as_well(name, value):
    """Steps that are counted down to 0 would never end."""
    _, optimizer, step = switched(lower_steps="auto", max_lower_steps=5)
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= 1, got {value}"):
        setattr(optimizer, name, value)
    assert step(True)
    optimizer.lower_steps = 3
    assert step(True) == 3


def test_a_warm_up_cannot_be_asked_for_later():
    _, optimizer, _ = switched()
    with pytest.raises(AttributeError, match="warmup_steps is read at construction"):
        optimizer.warmup_steps = 10


@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_a_resumed_run_is_bit_equal(penalty):
    options = {"lower_steps": "auto", "max_lower_steps": 9, "penalty": penalty}
    run = Waiting(**options)
    for _ in range(7):
        run.step()
    other = Waiting(**options)
    with torch.no_grad():
        other.u.copy_(run.u)
        other.v.copy_(run.v)
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    # A new optimizer looks at its closures first: the first step may call them more often.
    assert run.step()[1] == other.step()[1]
    assert [run.step() for _ in range(5)] == [other.step() for _ in range(5)]
    assert torch.equal(run.u, other.u)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_steps": "often"}, "must be an integer >= 1 or \"auto\", got 'often'"),
        ({"lower_steps": 0}, "must be an integer >= 1, got 0"),
        (
            {"lower_steps": "auto", "certificate_tolerance": 0.0},
            r"tolerance must lie in \(0, 1\), got 0.0; q = 0",
        ),
        ({"lower_steps": "auto", "max_lower_steps": 0}, "max_lower_steps must be an integer >= 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(*start(), **options)


def test_the_relative_certificate_is_that_of_the_exact_derivatives():
    u, v, optimizer = build(*start(), upper_lr=0.02, lower_lr=0.02)
    for _ in range(5):
        optimizer.lower_step(*closures("quadratic", u, v, "auto"))
    (nu,), at = optimizer.adjoint, (u.detach(), v.detach().clone())
    optimizer.lower_step(*closures("quadratic", u, v, "auto"))
    slope = torch.func.grad(quadratic_f, 1)(*at)
    product = torch.func.hessian(quadratic_g, 1)(*at) @ nu
    expected = (slope + product).norm() / slope.norm()
    torch.testing.assert_close(optimizer.metrics.relative_certificate, expected)


def test_metrics_as_numbers():
    u, v, optimizer = build(*start())
    unknown = optimizer.metrics.as_dict()
    assert unknown.pop("gradient_evaluations") == 0
    assert all(value != value for value in unknown.values())
    optimizer.step(*closures("quadratic", u, v, "auto"))
    found = optimizer.metrics.as_dict()
    assert found["upper_loss"] == float(optimizer.metrics.upper_loss)
    assert found["relative_certificate"] == pytest.approx(1.0)  # q = 0
    assert found["correction_gain"] == 0.0
    assert all(type(value) is float for value in found.values())
