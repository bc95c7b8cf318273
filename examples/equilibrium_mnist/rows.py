"""What ``equilibrium_mnist`` compares: models without an equilibrium, exact hypergradients."""

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
from examples.shared.run import Run
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


def softmax(problem: Problem) -> Line:
    """Softmax regression."""
    images, labels, test_images, test_labels = (part.cpu() for part in problem)
    began = time.process_time()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(images, labels)
    seconds = time.process_time() - began
    told = model.predict_proba(images)[np.arange(len(labels)), labels]
    test = float(model.score(test_images, test_labels))
    return {"loss": float(-np.log(told).mean()), "test": test, "seconds": seconds}


def network(problem: Problem, seed: int, width: int, upper_lr: float, steps: int, run: Run) -> Line:
    """The network without W."""
    p = make_parameters(seed, width, problem.images.dtype, device=problem.images.device)
    with torch.no_grad():
        p["W"].zero_()
    learned = [value for name, value in p.items() if name != "W"]
    rule = torch.optim.Adam(learned, lr=upper_lr)
    nothing = torch.zeros_like(p["b"])[None]
    for _ in run.steps(steps, *learned, rule):
        rule.zero_grad()
        loss_of(p, layer(p, nothing, problem.images), problem.labels).backward()
        rule.step()
    return {**seen(p, problem), "seconds": run.seconds, "steps": steps, "evaluations": steps}


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


def agreement(
    data: tuple[Tensor, Tensor], width: int, device: torch.device, samples: int = 100
) -> Line:
    """1 - cosine and relative error of the three, at a random point with ||W|| = 0.9."""
    drawn = make_problem(data, 0, samples, 1)
    problem = Problem(*(part.to(device) for part in drawn))
    problem = problem._replace(images=problem.images.double())
    p = make_parameters(0, width, torch.float64, device=device)
    with torch.no_grad():
        p["W"].mul_(0.9 / 0.5)
    found = hypergradients(p, problem)
    exact = found.pop("exact")
    return {
        method: {
            "1 - cosine": 1 - float(torch.cosine_similarity(vector, exact, dim=0)),
            "relative error": float((vector - exact).norm() / exact.norm()),
        }
        for method, vector in found.items()
    }
