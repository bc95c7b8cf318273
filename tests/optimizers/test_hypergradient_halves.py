"""Both halves, ``restart_lower`` and the self-check of ``HypergradientOptimizer``.

g = (v - B u)'A(v - B u) / 2, f = |v - b|^2 / 2 + |u|^2 / 2, so J = -B'A and H = A.
"""

import copy

import pytest
import torch

from torch_penalty_bilevel import HypergradientOptimizer, NonFiniteError


class Run:
    def __init__(self, method="cg", **options):
        draw = torch.Generator().manual_seed(2)
        root = torch.randn(4, 4, generator=draw)
        self.A, self.B = root @ root.T / 4 + torch.eye(4), torch.randn(4, 3, generator=draw)
        self.b = torch.randn(4, generator=draw)
        self.u = torch.randn(3, generator=draw).requires_grad_()
        self.v = torch.randn(4, generator=draw).requires_grad_()
        rules = torch.optim.SGD([self.u], lr=0.1), torch.optim.SGD([self.v], lr=0.2)
        self.optimizer = HypergradientOptimizer(*rules, method=method, **options)

    def f(self):
        return (self.v - self.b).square().sum() / 2 + self.u.square().sum() / 2

    def g(self):
        away = self.v - self.B @ self.u
        return away @ self.A @ away / 2

    @property
    def both(self):
        return self.f, self.g

    @property
    def exact(self):
        """The hypergradient by implicit differentiation at (u, v)."""
        q = torch.linalg.solve(self.A, -(self.v - self.b)).detach()
        return self.u.detach() - self.B.T @ self.A @ q


def test_a_lower_step_moves_v_by_its_rule_and_nothing_else():
    run = Run()
    u, v = run.u.detach().clone(), run.v.detach().clone()
    value = run.f().detach()
    assert torch.equal(run.optimizer.lower_step(*run.both), value)
    torch.testing.assert_close(run.v.detach(), v - 0.2 * run.A @ (v - run.B @ u))
    assert torch.equal(run.u, u)
    assert float(run.optimizer.adjoint[0].norm()) == 0


def test_an_upper_step_takes_the_implicit_hypergradient_and_leaves_v():
    run = Run(inner_iterations=20)
    run.optimizer.lower_step(*run.both)
    u, v, exact = run.u.detach().clone(), run.v.detach().clone(), run.exact
    run.optimizer.upper_step(*run.both)
    torch.testing.assert_close(run.u.grad, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.u.detach(), u - 0.1 * exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(run.v, v)


def test_halves_are_the_whole():
    whole, halves = Run(lower_steps=3), Run()
    for _ in range(5):
        whole.optimizer.step(*whole.both)
        for _ in range(3):
            halves.optimizer.lower_step(*halves.both)
        halves.optimizer.upper_step(*halves.both)
    torch.testing.assert_close(halves.u, whole.u, rtol=0, atol=1e-14)
    torch.testing.assert_close(halves.v, whole.v, rtol=0, atol=1e-14)


def test_a_half_that_fails_changes_nothing():
    run = Run()
    before = run.v.detach().clone(), copy.deepcopy(run.optimizer.state_dict())
    for half in (run.optimizer.lower_step, run.optimizer.upper_step):
        with pytest.raises(NonFiniteError):
            half(lambda: run.f() / 0, lambda: run.g() / 0)
    assert torch.equal(run.v, before[0])
    assert run.optimizer._counts == {"steps": 0, "gradient_evaluations": 0}


def test_a_restart_forgets_the_adjoint_and_where_v_began():
    run = Run(warm_start=False, lower_steps=2)
    run.optimizer.step(*run.both)
    assert float(run.optimizer.adjoint[0].norm()) > 0
    run.optimizer.restart_lower()
    assert float(run.optimizer.adjoint[0].norm()) == 0
    with torch.no_grad():
        run.v.fill_(5.0)
    u, v = run.u.detach().clone(), run.v.detach().clone()
    run.optimizer.step(*run.both)
    for _ in range(2):  # from the present v
        v = v - 0.2 * run.A @ (v - run.B @ u)
    torch.testing.assert_close(run.v.detach(), v)


def test_the_self_check_judges_what_the_upper_step_would_apply():
    run = Run(inner_iterations=20)
    for _ in range(60):
        run.optimizer.lower_step(*run.both)
    before = run.u.detach().clone(), run.v.detach().clone(), run.optimizer.adjoint
    report = run.optimizer.check_hypergradient(*run.both)
    assert report.agrees
    torch.testing.assert_close(report.estimate[0], run.exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(report.exact[0], run.exact, rtol=1e-8, atol=1e-8)
    assert torch.equal(run.u, before[0])
    assert torch.equal(run.v, before[1])
    assert run.optimizer.adjoint == before[2]
    one = Run("one_step")
    one.v.data.copy_(run.v)
    assert not one.optimizer.check_hypergradient(*one.both).agrees  # q = -lr grad_v f


def test_what_reverse_cannot_do_is_refused():
    run = Run("reverse")
    for call in (run.optimizer.upper_step, run.optimizer.check_hypergradient):
        with pytest.raises(ValueError, match="no lower steps to go back through"):
            call(*run.both)
