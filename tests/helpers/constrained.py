"""What the tests of constraints share: sets and who is in them, a quadratic, a plain rule."""

import torch

from torch_penalty_bilevel import LeastSquares, Stationarity
from torch_penalty_bilevel.constraints import Ball, Box, NonNegative, Simplex

SGD, Adam = torch.optim.SGD, torch.optim.Adam
PLAIN = Stationarity(LeastSquares(share=0.0))
SETS = {
    "box": Box(-0.5, 0.7),
    "non_negative": NonNegative(),
    "simplex": Simplex(),
    "ball": Ball(1.3),
    "rows": Ball(0.8, rows=True),
}


def leaf(values, dtype=torch.float64):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def in_set(name, x, tolerance):
    if name == "box":
        return bool(((x >= -0.5) & (x <= 0.7)).all())
    if name == "non_negative":
        return bool((x >= 0).all())
    if name == "simplex":
        return bool((x >= 0).all()) and bool(((x.sum(-1) - 1).abs() <= tolerance).all())
    if name == "ball":
        return bool(x.norm() <= 1.3 + tolerance)
    return bool((x.norm(dim=1) <= 0.8 + tolerance).all())


def follow(u, v):
    """The lower loss whose solution is v = u."""
    return 0.5 * (v - u).square().sum()
