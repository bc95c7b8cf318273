"""What the tests of the self-check share."""

import torch
from stepping import build, closures, start

ENGINES = ("auto", "double_backward", "functional", "finite_difference")


def names(report):
    return [finding.name for finding in report.findings]


def warm(name="curved", steps=20, **options):
    """An optimizer somewhere on its way, and its closures."""
    options = {"upper_lr": 0.02, "lower_lr": 0.02} | options
    u, v, optimizer = build(*start(), **options)
    f, g = closures(name, u, v, options.get("curvature", "auto"))
    for _ in range(steps):
        optimizer.step(f, g)
    return u, v, optimizer, f, g


def leaf(*values):
    return torch.tensor(values, requires_grad=True)
