"""A set of the user's own, and subclasses of ours, in the optimizer and in ``minimize``."""

import pytest
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer, minimize
from torch_penalty_bilevel.constraints import Face, Projection, Simplex


class HalfSpace(Projection):
    """{x: sum(x) <= bound}."""

    def __init__(self, bound):
        self.bound = bound

    def project(self, point):
        return point - (point.sum() - self.bound).clamp(min=0) / point.numel()

    def face(self, point, gradient):
        active = (point.sum() >= self.bound - 1e-12) & (gradient.sum() < 0)
        normal = active * torch.full_like(point, point.numel() ** -0.5)

        def retract(before, after):
            on_plane = before + flat.tangent(after - before)
            return self.project(torch.where(active, on_plane, after))

        flat = Face(retract, normal=normal, dims=(0,))
        return flat

    def values(self, point):
        return point.sum().reshape(1) - self.bound


class Shares(Simplex):
    """A subclass under another name."""


TARGET = torch.tensor([2.0, 1.0], dtype=torch.float64)


def f(v):
    return (v - TARGET).square().sum()


def g(u, v):
    return (v - u).square().sum()


@pytest.mark.parametrize(
    ("make", "solution"),
    # The nearest point to (2, 1): on x + y = 1, and of the triangle.
    [
        (lambda: HalfSpace(1.0), [1.0, 0.0]),
        (Shares, [1.0, 0.0]),
        (lambda: HalfSpace(2.0), [1.5, 0.5]),
    ],
)
def test_upper_sets_in_both(make, solution):
    u, v = torch.tensor([0.5, 0.5]).requires_grad_(), torch.zeros(2, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([u], lr=0.05), torch.optim.SGD([v], lr=0.2), upper_constraint=make()
    )
    for _ in range(500):
        optimizer.step(lambda: f(v), lambda: g(u, v))
    torch.testing.assert_close(u.detach(), torch.tensor(solution), rtol=0, atol=1e-6)
    found = minimize(
        lambda u, v: f(v), g, torch.tensor([0.5, 0.4]), torch.zeros(2), upper_constraint=make()
    )
    torch.testing.assert_close(found.upper, torch.tensor(solution), rtol=0, atol=1e-6)


def test_a_lower_half_space_in_both():
    """v is the projection of u onto x + y <= 1. With s = u_1 + u_2 >= 1, d = (u_1 - u_2) / 2 it is
    (1/2 + d, 1/2 - d), so f = |v - (0, 2)|^2 + (s - 3)^2 has its minimum at s = 3, d = -1."""

    def upper(u, v):
        return (v - torch.tensor([0.0, 2.0])).square().sum() + (u.sum() - 3).square()

    wanted = torch.tensor([0.5, 2.5])
    u, v = torch.tensor([1.0, 1.0]).requires_grad_(), torch.tensor([0.5, 0.5]).requires_grad_()
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([u], lr=0.05), torch.optim.SGD([v], lr=0.2), lower_constraint=HalfSpace(1.0)
    )
    for _ in range(500):
        optimizer.step(lambda: upper(u, v), lambda: g(u, v))
    torch.testing.assert_close(u.detach(), wanted, rtol=0, atol=1e-6)
    found = minimize(upper, g, torch.ones(2), torch.zeros(2), lower_constraint=HalfSpace(1.0))
    torch.testing.assert_close(found.upper, wanted, rtol=0, atol=1e-5)


def test_a_set_without_values_is_refused_with_the_remedy():
    class Bare:
        def project(self, point):
            return point

        def face(self, point, gradient):
            return Face()

    with pytest.raises(TypeError, match=r"subclasses constraints.Projection and offers values"):
        minimize(lambda u, v: f(v), g, torch.ones(2), torch.ones(2), upper_constraint=Bare())
