"""Small tasks of the race's three problems."""

import numpy as np
import torch
from scipy.sparse import csr_matrix

from benchmarks.race import l2, mnist, omniglot
from benchmarks.shared.mnist_rows import Problem
from examples.tune_l2 import problem as l2_rows


def mnist_task():
    """Twelve and ten random images; every batch is all of them, in another order."""
    generator = torch.Generator().manual_seed(0)
    images, clean, tests = (
        torch.rand(n, 784, generator=generator).reshape(n, 1, 28, 28) for n in (12, 10, 8)
    )
    labels, clean_labels, test_labels = (
        torch.randint(10, (n,), generator=generator) for n in (12, 10, 8)
    )
    truth = torch.where(torch.arange(12) < 6, labels, (labels + 1) % 10)
    tested = tests, test_labels
    problem = Problem(images, labels, truth, clean, clean_labels, *tested, model="mlp", seed=3)
    return mnist.Task(problem)


def l2_problem():
    generator = np.random.default_rng(0)
    X = generator.random((60, 12)) * (generator.random((60, 12)) < 0.5)
    y = generator.integers(3, size=60)
    y[:3] = 0, 1, 2
    test = l2_rows.Rows(csr_matrix(X[40:]), y[40:], torch.float64)
    return l2_rows.assemble(csr_matrix(X), y, np.arange(20), np.arange(20, 40), test, torch.float64)


def l2_task():
    return l2.Task(l2_problem())


def omniglot_task():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.rand(40, 8, 1, 14, 14), torch.rand(9, 6, 1, 14, 14)
    tasks = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(7)])
    return omniglot.Task(omniglot.Problem(train, test, tasks, seed=3))


TASKS = {"mnist": mnist_task, "l2": l2_task, "omniglot": omniglot_task}
