"""What ``equilibrium_mnist.py`` compares: models without an equilibrium, exact hypergradients."""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from examples.equilibrium_mnist.problem import (
    Parameters,
    Problem,
    equilibrium,
    layer,
    loss_of,
    make_parameters,
    make_problem,
)
from examples.shared.record import Line
from examples.shared.table import markdown
from torch_penalty_bilevel import (
    FixedPoint,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
    functional,
)

METHODS = ("penalty", "fixed_point", "cg_normal")


@torch.no_grad()
def seen(p: Parameters, problem: Problem) -> Line:
    """Training loss and test accuracy at the solved equilibrium; the norm of W."""
    z = equilibrium(p, problem.images)
    outputs = equilibrium(p, problem.test_images) @ p["C"].T + p["c"]
    return {
        "loss": loss_of(p, z, problem.labels).item(),
        "test": (outputs.argmax(1) == problem.test_labels).double().mean().item(),
        "norm": torch.linalg.matrix_norm(p["W"], 2).item(),
    }


def baselines(problem: Problem, seed: int, width: int, upper_lr: float, steps: int) -> Line:
    """Softmax regression, and the network without W."""
    began = time.process_time()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(problem.images, problem.labels)
    linear = {
        "loss": float(-np.log(_of_labels(model, problem)).mean()),
        "test": float(model.score(problem.test_images, problem.test_labels)),
        "seconds": time.process_time() - began,
    }
    p = make_parameters(seed, width, problem.images.dtype)
    with torch.no_grad():
        p["W"].zero_()
    learned = [value for name, value in p.items() if name != "W"]
    rule, began = torch.optim.Adam(learned, lr=upper_lr), time.process_time()
    nothing = torch.zeros_like(p["b"])[None]
    for _ in range(steps):
        rule.zero_grad()
        loss_of(p, layer(p, nothing, problem.images), problem.labels).backward()
        rule.step()
    seconds = time.process_time() - began
    flat = {**seen(p, problem), "seconds": seconds, "steps": steps, "evaluations": steps}
    return {"softmax regression": linear, "network, W = 0": flat}


def _of_labels(model: LogisticRegression, problem: Problem) -> np.ndarray:
    rows = np.arange(len(problem.labels))
    return model.predict_proba(problem.images)[rows, problem.labels]


def hypergradients(p: Parameters, problem: Problem) -> dict[str, Tensor]:
    """What the three optimizers find at (p, z*(p)) if u is held, and the exact hypergradient.

    Each as one vector. The penalty's multiplier is given 2,000 lower steps.
    """
    start = equilibrium(p, problem.images, 1e-14)
    found = {}
    for method in METHODS:
        z = start.clone().requires_grad_()
        held = torch.optim.SGD(list(p.values()), lr=0.0)
        lower = torch.optim.SGD([z], lr=1.0)
        upper_loss = lambda z=z: loss_of(p, z, problem.labels)  # noqa: E731
        lower_map = lambda z=z: layer(p, z, problem.images)  # noqa: E731
        if method == "penalty":
            optimizer = PenaltyBilevelOptimizer(held, lower, penalty=FixedPoint())
            for _ in range(2000):
                optimizer.lower_step(upper_loss, lower_map)
            optimizer.upper_step(upper_loss, lower_map)
        else:
            HypergradientOptimizer(
                held,
                lower,
                method=method,
                inner_iterations=2000,
                tolerance=1e-12,
                lower_is_map=True,
            ).step(upper_loss, lower_map)
        found[method] = torch.cat([value.grad.ravel() for value in p.values()])
    exact, _ = functional.hypergradient(
        lambda p, z: loss_of(p, z, problem.labels),
        lambda p, z: layer(p, z, problem.images),
        p,
        start,
        method="cg_normal",
        lower_is_map=True,
        tolerance=1e-12,
    )
    found["exact"] = torch.cat([value.ravel() for value in exact.values()])
    return found


def agreement(data: tuple[Tensor, Tensor], width: int, samples: int = 100) -> str:
    """Cosines and relative errors of the three in Markdown, at a random point with ||W|| = 0.9."""
    drawn = make_problem(data, 0, samples, 1)
    problem = drawn._replace(images=drawn.images.double())
    p = make_parameters(0, width, torch.float64)
    with torch.no_grad():
        p["W"].mul_(0.9 / 0.5)
    found = hypergradients(p, problem)
    exact = found.pop("exact")
    rows = {}
    for method, vector in found.items():
        cosine = torch.cosine_similarity(vector, exact, dim=0)
        error = (vector - exact).norm() / exact.norm()
        rows[method] = [f"{1 - float(cosine):.1e}", f"{float(error):.1e}"]
    return markdown(["hypergradient", "1 - cosine", "relative error"], rows)
