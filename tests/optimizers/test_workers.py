"""Halves of both losses on two workers, averaged by ``reduce``, are the whole on one."""

import pytest
import torch
from stepping import PROBLEMS, start

from torch_penalty_bilevel import PenaltyBilevelOptimizer


@pytest.mark.parametrize("penalty", ["stationarity", "paper", "value"])
def test_steps_are_those_of_one_worker(penalty):
    """This worker has twice the losses, the other none: their average is the loss itself."""
    ends = []
    for factor in (1.0, 2.0):
        u, v = (t.clone().requires_grad_() for t in start())
        optimizer = PenaltyBilevelOptimizer(
            [u], [v], penalty=penalty, reduce=lambda ts, c=factor: tuple(t / c for t in ts)
        )
        f, g = PROBLEMS["curved"]
        for _ in range(6):
            optimizer.step(
                lambda u=u, v=v, c=factor, f=f: c * f(u, v),
                lambda u=u, v=v, c=factor, g=g: c * g(u, v),
            )
        numbers = optimizer.metrics
        seen = numbers.residual_norm, numbers.adjoint_residual_norm, numbers.upper_grad_norm
        ends.append(torch.cat([u.detach(), v.detach(), *optimizer.adjoint, torch.stack(seen)]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
