"""Perturbations within a box, a ball and both: exact bounds, projections, runs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from blocks import check_hypergradient, every_engine
from scipy.optimize import minimize as scipy_minimize

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Ball, Box, BoxAndBall
from torch_penalty_bilevel.nn import BoundedPerturbation

X = torch.tensor([[0.9, 0.5, 0.0], [0.2, 1.0, 0.7], [0.4, 0.4, 0.4]], dtype=torch.float64)
KINDS = {
    "box": ({"low": 0.0, "high": 1.0}, Box),
    "ball": ({"radius": 0.3}, Ball),
    "both": ({"low": 0.0, "high": 1.0, "radius": 0.3}, BoxAndBall),
    "above": ({"high": 1.0, "radius": 0.3}, BoxAndBall),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def nearest(x, delta, low=-np.inf, high=np.inf, radius=np.inf):
    """One row, by scipy."""
    return torch.from_numpy(
        scipy_minimize(
            lambda d: ((d - delta.numpy()) ** 2).sum(),
            np.zeros(3),
            bounds=[(low - a, high - a) for a in x.tolist()],
            constraints={"type": "ineq", "fun": lambda d: min(radius, 9) ** 2 - (d**2).sum()},
            method="SLSQP",
            tol=1e-15,
        ).x
    )


@every_kind
def test_project_is_the_nearest_point_row_by_row(kind):
    bounds, constraint = KINDS[kind]
    block = BoundedPerturbation(X, **bounds)
    assert type(block.constraint) is constraint
    for seed in range(5):
        torch.manual_seed(seed)
        delta = 0.6 * torch.randn(3, 3)
        with torch.no_grad():
            block.delta.copy_(delta)
        block.project_()
        wanted = torch.stack([nearest(x, d, **bounds) for x, d in zip(X, delta, strict=True)])
        torch.testing.assert_close(block.delta.detach(), wanted, rtol=0, atol=1e-6)
        once = block.delta.detach().clone()
        block.project_()
        assert torch.equal(block.delta, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("radius", [None, 0.8])
def test_the_sum_is_in_the_box_to_the_last_bit(dtype, radius):
    """High - x and low - x round: added to x they may come out beyond."""
    low = torch.tensor([-0.1, -0.3, -0.013], dtype=dtype)
    high = torch.tensor([0.7, 0.033, 1.1], dtype=dtype)
    x = torch.lerp(low, high, torch.rand(2000, 3, dtype=dtype)).clamp(low, high)
    block = BoundedPerturbation(x, low, high, radius)
    assert bool(((x + (high - x) > high) | (x + (low - x) < low)).any())
    for sign in (1.0, -1.0):
        with torch.no_grad():
            block.delta.copy_(sign * (2 + torch.rand_like(x)))
        block.project_()
        assert bool(((block() >= low) & (block() <= high)).all())
        if radius is None:
            end = high if sign > 0 else low
            torch.testing.assert_close(block(), end.expand(2000, 3), rtol=1e-2, atol=1e-2)


def test_forward_adds_and_picks_rows():
    block = BoundedPerturbation(X, radius=1.0)
    assert torch.equal(block(), X)
    with torch.no_grad():
        block.delta.copy_(torch.arange(9.0).reshape(3, 3))
    index = torch.tensor([2, 0])
    assert torch.equal(block(index), (X + block.delta)[index])
    (slope,) = torch.autograd.grad(block(index).sum(), block.delta)
    assert torch.equal(slope, torch.tensor([[1.0], [0], [1]]).expand(3, 3))


def test_bounds_of_single_entries_and_images():
    images = torch.rand(2, 1, 4, 4)
    low, high = (images - 0.1).clamp(min=0), (images + 0.2).clamp(max=1)
    block = BoundedPerturbation(images, low, high, radius=0.25)
    with torch.no_grad():
        block.delta.normal_()
    block.project_()
    assert bool(((block() >= low) & (block() <= high)).all())
    torch.testing.assert_close(block.delta.flatten(1).norm(dim=1).detach(), torch.full((2,), 0.25))


@every_engine
@every_kind
def test_hypergradient_in_the_optimizer(engine, kind):
    """Inside of the set it is the free one."""
    block, v = (
        BoundedPerturbation(X * 0.8 + 0.1, **KINDS[kind][0]),
        torch.zeros(3, requires_grad=True),
    )
    y, index = torch.tensor([1.0, -1.0]), torch.tensor([2, 0])
    check_hypergradient(
        block.parameters(),
        [v],
        lambda: -(X @ v).cos().mean(),
        lambda: (block(index) @ v - y).square().mean() + 0.2 * v.square().sum(),
        engine,
        lr=0.4,
        steps=250,
        upper_constraint=block.constraint,
    )


@pytest.mark.parametrize("kind", ["box", "both"])
@pytest.mark.parametrize("through", ["constraint", "project_"])
def test_runs_end_at_the_best_perturbation(kind, through):
    """v = mean of the rows in the batch; f pulls it towards a target: then the nearest point.

    f = |v - target|^2 is least where delta of the one row is nearest to 1 * target - x.
    """
    bounds, target = KINDS[kind][0], torch.tensor([1.5, 0.8, -0.3])
    block, v = BoundedPerturbation(X, **bounds), torch.zeros(3, requires_grad=True)
    index = torch.tensor([0])
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD(block.parameters(), lr=0.1),
        torch.optim.SGD([v], lr=0.4),
        upper_constraint=block.constraint if through == "constraint" else None,
    )
    if through == "project_":
        optimizer.upper.register_step_post_hook(lambda *_: block.project_())
    for _ in range(200):
        optimizer.step(
            lambda: (v - target).square().sum(), lambda: (v - block(index)[0]).square().sum()
        )
    wanted = nearest(X[0], target - X[0], **bounds)
    torch.testing.assert_close(block.delta[0].detach(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(block.delta[1:].detach(), torch.zeros(2, 3))  # not in the batch


def test_state_holds_the_perturbation_alone():
    block = BoundedPerturbation(X, low=0.0, high=1.0, radius=0.3)
    with torch.no_grad():
        block.delta.normal_()
    block.project_()
    assert [*block.state_dict()] == ["delta"]
    assert [name for name, _ in block.named_parameters()] == ["delta"]
    other = BoundedPerturbation(X, low=0.0, high=1.0, radius=0.3)
    other.load_state_dict(block.state_dict())
    for twin in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(), block())
        point = torch.randn(3, 3)
        assert torch.equal(twin.constraint.project(point), block.constraint.project(point))
    single = copy.deepcopy(block).float()
    assert single().dtype == torch.float32
    assert torch.equal(X, BoundedPerturbation(X, radius=1.0).inputs)
    assert "(3, 3), radius=0.3" in repr(block)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: BoundedPerturbation(X), ValueError, "without a bound delta is free"),
        (lambda: BoundedPerturbation(X, low=-torch.inf), ValueError, "without a bound"),
        (lambda: BoundedPerturbation(X.byte(), radius=1.0), TypeError, "got torch.uint8"),
        (lambda: BoundedPerturbation([1.0], radius=1.0), TypeError, "got list"),
        (lambda: BoundedPerturbation(X, high=0.95), ValueError, "values from 0 to 1; clamp them"),
        (lambda: BoundedPerturbation(X, low=0.1), ValueError, "inputs must lie in"),
        (lambda: BoundedPerturbation(X * torch.nan, high=2.0), ValueError, "inputs has NaN"),
        (lambda: BoundedPerturbation(X * torch.nan, radius=1.0), ValueError, "inputs has NaN"),
        (lambda: BoundedPerturbation(X, low=1, high=0), ValueError, "low must be at most high"),
        (lambda: BoundedPerturbation(X, low=torch.nan), ValueError, "low must be at most high"),
        (lambda: BoundedPerturbation(X, high=torch.nan), ValueError, "low must be at most high"),
        (lambda: BoundedPerturbation(X, radius=0.0), ValueError, "radius must be a finite number"),
        (lambda: BoundedPerturbation(X[0], radius=1.0), ValueError, "needs rows"),
        (
            lambda: BoundedPerturbation(X, low=torch.zeros(2)),
            ValueError,
            r"low of shape \(2,\) does not broadcast to inputs of shape \(3, 3\)",
        ),
    ],
)
def test_arguments_are_checked(build, error, message):
    with pytest.raises(error, match=message):
        build()
