"""Small networks in training, and by value all that a step may touch."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_penalty_bilevel import PenaltyBilevelOptimizer


class Task:
    """Ridge-like cleaning: per-sample weights above, a small network below."""

    def __init__(self, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(12, 3, generator=generator)
        self.y = torch.randn(12, 1, generator=generator)
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.weights = torch.zeros(8, requires_grad=True)
        defaults = {"upper_lr": 0.05, "lower_lr": 0.02}
        self.optimizer = PenaltyBilevelOptimizer(
            [self.weights], self.net.parameters(), **(defaults | options)
        )

    def upper(self):
        return (self.net(self.x[8:]) - self.y[8:]).square().mean()

    def lower(self):
        losses = (self.net(self.x[:8]) - self.y[:8]).square().squeeze(1)
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (torch.sigmoid(self.weights) * losses).mean() + 0.01 * decay

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.upper, self.lower)
        return self

    def point(self):
        return torch.cat(
            [self.weights.detach(), *(p.detach().flatten() for p in self.net.parameters())]
        )


def noisy_task(**options):
    task = Task(**options)
    task.net.insert(1, nn.BatchNorm1d(4))
    task.net.append(nn.Dropout(0.2))
    task.optimizer = PenaltyBilevelOptimizer(
        [task.weights], task.net.parameters(), upper_lr=0.05, lower_lr=0.02, **options
    )
    return task


class Net:
    """A network with dropout and BatchNorm, per-sample weights, a batch drawn per step."""

    def __init__(self, penalty="value", **options):
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)
        )
        self.x, self.y = torch.randn(24, 3), torch.randn(24, 1)
        self.weights = torch.zeros(16, requires_grad=True)
        self.optimizer = PenaltyBilevelOptimizer(
            [self.weights],
            self.net.parameters(),
            penalty=penalty,
            upper_lr=0.05,
            lower_lr=0.02,
            **options,
        )
        self.batch, self.seen = torch.arange(16), []

    def upper(self):
        return (self.net(self.x[16:]) - self.y[16:]).square().mean()

    def lower(self):
        hook = self.net[4].register_forward_pre_hook(
            lambda module, inputs: self.seen.append(
                (inputs[0] == 0, module.weight.detach().clone())
            )
        )
        each = (self.net(self.x[self.batch]) - self.y[self.batch]).square().squeeze(1)
        hook.remove()
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.weights[self.batch].sigmoid() * each).mean() + 0.01 * decay

    def point(self):
        return torch.cat([p.detach().reshape(-1) for p in (self.weights, *self.net.parameters())])

    def run(self, steps):
        for _ in range(steps):
            self.batch = torch.randint(16, (8,))
            self.optimizer.step(self.upper, self.lower)
        return self


def everything(task):
    """All that a step may touch, by value."""
    state, own = task.optimizer.state_dict(), task.optimizer._own_state()
    flat = [task.point(), torch.get_rng_state(), task.optimizer.metrics.upper_loss]
    flat += [torch.as_tensor(x).clone() for x in tree_leaves(state["state"])]
    lists = [own[name] for name in task.optimizer._dual.lists() if name != "moments"]
    flat += [t.clone() for held in lists for t in held]
    flat += [torch.as_tensor(x).clone() for x in own["scalars"].values()]
    flat += [torch.as_tensor(own[k]) for k in ("steps", "gradient_evaluations")]
    flat += [t.clone() for t in task.optimizer.adjoint]
    flat += [b.clone() for b in task.net.buffers()]
    return flat, random.getstate(), np.random.get_state()[1].tolist()


def assert_unchanged(before, task):
    after = everything(task)
    assert before[1:] == after[1:]
    assert len(before[0]) == len(after[0])
    for a, b in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
