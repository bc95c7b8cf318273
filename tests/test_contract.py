"""What every penalty, rule and engine has to keep, each over the table of ``contract.py``."""

import copy
import itertools

import pytest
import torch
from contract import ENGINES, FORMULATIONS, Problem, cases, refused

from torch_penalty_bilevel import PenaltyBilevelOptimizer

every = pytest.mark.parametrize(("formulation", "engine"), cases())
# A map names all parameters, and pure functions take those that move.
of_live_losses = [
    (f, e) for f, e in cases() if not (FORMULATIONS[f].is_map or ENGINES[e].takes_pure)
]
# The others are biased as asked for, or far from done in a test's time.
exact = {f: 1e-3 for f in FORMULATIONS if "ridge" not in f and "paper" not in f}
exact |= {"value": 0.1, "fixed point, heavy ball": 0.02}


class Run(Problem):
    def __init__(self, formulation, engine):
        super().__init__(FORMULATIONS[formulation], ENGINES[engine])
        self.optimizer = PenaltyBilevelOptimizer(
            torch.optim.Adam([self.u], lr=0.02),
            torch.optim.SGD(self.v, lr=0.1, momentum=0.5),
            penalty=self.formulation.make(),
            curvature=self.engine.make(),
        )

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(*self.closures)
        return self

    def point(self):
        return torch.cat([t.detach() for t in (self.u, *self.v)])


@every
def test_hypergradient_and_certificate_are_those_of_the_reported_adjoint(formulation, engine):
    run = Run(formulation, engine).steps(7)
    f_u, f_v, J, H = run.derivatives
    run.optimizer.upper_step(*run.closures)
    q = torch.cat(run.optimizer.adjoint)
    assert float(q.norm()) > 0
    # The value gap divides by the distance of v and z.
    tolerance = run.engine.tolerance if formulation != "value" else 1e-8
    torch.testing.assert_close(run.u.grad, f_u + J @ q, rtol=tolerance, atol=tolerance)
    certificate = run.optimizer.metrics.adjoint_residual_norm
    torch.testing.assert_close(certificate, (f_v + H @ q).norm(), rtol=tolerance, atol=tolerance)


@every
def test_the_named_path_ran(formulation, engine):
    run = Run(formulation, engine)
    wanted = type(run.formulation.make()), type(run.engine.make())
    assert (type(run.optimizer.penalty), type(run.optimizer.curvature)) == wanted
    used = []
    for part, method in (
        (run.optimizer.penalty, "evaluate"),
        (run.optimizer.penalty.rule, "lower_update"),
        (run.optimizer.curvature, "gradient"),
        (run.optimizer.curvature, "linearise_map" if run.formulation.is_map else "linearise"),
    ):
        original = getattr(part, method)

        def spied(*args, original=original, method=method, **kwargs):
            used.append(method)
            return original(*args, **kwargs)

        setattr(part, method, spied)
    run.steps(2)
    expected = {"evaluate", "lower_update", "gradient", "linearise_map", "linearise"}
    expected -= {"linearise" if run.formulation.is_map else "linearise_map"}
    if formulation == "value" and engine != "finite_difference":  # whose first look takes one
        expected -= {"linearise"}
    assert {*used} == expected


@every
def test_a_resumed_run_is_bit_equal(formulation, engine):
    run = Run(formulation, engine).steps(6)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = Run(formulation, engine)
    for mine, theirs in zip((other.u, *other.v), (run.u, *run.v), strict=True):
        mine.data.copy_(theirs.data)
    other.optimizer.load_state_dict(saved)
    run.steps(6)
    other.steps(6)
    assert torch.equal(run.point(), other.point())
    assert run.optimizer._dual.packed()["scalars"] == other.optimizer._dual.packed()["scalars"]


@every
def test_a_step_that_raises_changes_nothing(formulation, engine):
    run = Run(formulation, engine).steps(3)
    f, g = run.closures
    run.calls = 0
    run.steps(1)
    calls = run.calls
    for fatal in range(1, calls + 1):
        point, memory = run.point(), copy.deepcopy(run.optimizer.state_dict())
        run.calls = 0

        def failing(closure, fatal=fatal):
            def call(*args):
                value = closure(*args)
                if run.calls >= fatal:
                    raise KeyError("stop")
                return value

            return call

        with pytest.raises(KeyError):
            run.optimizer.step(failing(f), failing(g))
        assert torch.equal(run.point(), point)
        assert_same(run.optimizer.state_dict(), memory)


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize(("formulation", "engine"), of_live_losses)
def test_a_frozen_parameter_waits_with_its_multiplier(formulation, engine):
    run = Run(formulation, engine)
    run.steps(4)
    frozen = run.v[0].requires_grad_(False)
    value, q = frozen.clone(), run.optimizer.adjoint[0].clone()
    moving = run.v[1].detach().clone()
    run.steps(3)
    assert torch.equal(frozen, value)
    assert torch.equal(run.optimizer.adjoint[0], q)
    assert not torch.equal(run.v[1], moving)


@pytest.mark.parametrize(("formulation", "bias"), exact.items())
@pytest.mark.long
def test_it_comes_to_the_solution(formulation, bias):
    """r = 0 and grad_u f - J H^{-1} grad_v f = 0; the value gap up to its bias O(1 / gamma)."""
    run = Run(formulation, "double_backward")
    for group in run.optimizer.lower.param_groups:
        group["lr"] = 0.5 if run.formulation.is_map else 0.1
    for k in range(1200):
        for group in run.optimizer.upper.param_groups:
            group["lr"] = 0.05 * max(0.0, 1 - k / 1100)
        run.steps(1)
    f_u, f_v, J, H = run.derivatives
    v, u = torch.cat(run.v).detach(), run.u.detach()
    matrix = run.M if run.formulation.is_map else run.A
    r = matrix @ (v - run.B @ u) + run.formulation.shift * v
    assert float(r.norm()) < bias
    assert float((f_u - J @ torch.linalg.solve(H, f_v)).norm()) < bias


@pytest.mark.parametrize(
    ("formulation", "engine"), [c for c in itertools.product(FORMULATIONS, ENGINES) if refused(*c)]
)
def test_refusals_name_the_remedy(formulation, engine):
    with pytest.raises(ValueError, match='use curvature="auto"'):
        Run(formulation, engine)
