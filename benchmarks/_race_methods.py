"""The methods of ``race.py``: every one is a function that makes one upper step, v along the way.

Letters as there: u one logit per training image, v the MLP's parameters, f and g the losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import higher
import torch
from _mnist_rows import BATCH, Problem, make_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchopt

Step = Callable[[], None]


class Rates(NamedTuple):
    """What is tuned; ``lower_steps`` is the number of v-steps per u-step."""

    lower: float
    upper: float
    lower_steps: int


class Task:
    """One run: its problem, its u and v, and its batches from the global random numbers.

    Runs of equal seed begin at equal v and u = 0. The global generator draws the batches because
    methods that repeat a closure put that one back.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = make_model("mlp", problem.seed)
        self.logits = torch.zeros(len(problem.labels), requires_grad=True)
        self.lower = list(self.model.parameters())
        self.names = [name for name, _ in self.model.named_parameters()]
        torch.manual_seed(problem.seed)
        self.draw()

    def draw(self) -> None:
        """A new batch for f and for g."""
        self.here = torch.randperm(len(self.problem.labels))[:BATCH]
        self.there = torch.randperm(len(self.problem.clean_labels))[:BATCH]

    def upper_loss(self, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        images, labels = self.problem.clean_images, self.problem.clean_labels
        return cross_entropy((model or self.model)(images[self.there]), labels[self.there])

    def lower_loss(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        logits: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        rows = self.here if rows is None else rows
        outputs = (model or self.model)(self.problem.images[rows])
        losses = cross_entropy(outputs, self.problem.labels[rows], reduction="none")
        logits = self.logits if logits is None else logits
        return (logits[rows].sigmoid() * losses).mean()

    def at(self, values: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """The model as a function of images, with ``values`` for its parameters."""
        named = dict(zip(self.names, values, strict=True))
        return lambda images: torch.func.functional_call(self.model, named, (images,))


def penalty(task: Task, rates: Rates, **options: str) -> Step:
    """This optimizer, every lower step on a batch of its own."""
    optimizer = PenaltyBilevelOptimizer(
        [task.logits], task.lower, upper_lr=rates.upper, lower_lr=rates.lower, **options
    )

    def step() -> None:
        for _ in range(rates.lower_steps - 1):
            task.draw()
            optimizer.lower_step(task.upper_loss, task.lower_loss)
        task.draw()
        optimizer.step(task.upper_loss, task.lower_loss)

    return step


def hypergradient(task: Task, rates: Rates, **options: object) -> Step:
    """This package's reference implementations; the closures draw, see its documentation."""
    optimizer = HypergradientOptimizer(
        [task.logits],
        task.lower,
        upper_lr=rates.upper,
        lower_lr=rates.lower,
        lower_steps=rates.lower_steps,
        **options,
    )

    def lower_loss() -> Tensor:
        task.draw()
        return task.lower_loss()

    def step() -> None:
        optimizer.step(task.upper_loss, lower_loss)

    return step


def implicit(task: Task, rates: Rates, solve: Callable[..., Tensor]) -> Step:
    """Implicit differentiation of warm-started Adam steps by torchopt's functional interface."""
    upper_rule = torch.optim.Adam([task.logits], lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)

    def loss(values: tuple[Tensor, ...], logits: Tensor, rows: Tensor) -> Tensor:
        return task.lower_loss(task.at(values), logits, rows)

    @torchopt.diff.implicit.custom_root(torch.func.grad(loss), argnums=1, solve=solve)
    def solution(start: tuple[Tensor, ...], logits: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        weights = logits.detach()
        for _ in range(rates.lower_steps):
            task.draw()
            lower_rule.zero_grad()
            with torch.enable_grad():
                task.lower_loss(logits=weights).backward()
            lower_rule.step()
        return tuple(p.detach().clone().requires_grad_() for p in task.lower)

    def step() -> None:
        task.draw()
        values = solution(tuple(task.lower), task.logits, task.here)
        upper_rule.zero_grad()
        task.upper_loss(task.at(values)).backward()
        upper_rule.step()

    return step


def unrolled(task: Task, rates: Rates) -> Step:
    """higher: differentiate through the lower Adam steps, which go on where they ended."""
    upper_rule = torch.optim.Adam([task.logits], lr=rates.upper)
    lower_rule = torch.optim.Adam(task.lower, lr=rates.lower)

    def step() -> None:
        with higher.innerloop_ctx(task.model, lower_rule) as (copy, inner):
            for _ in range(rates.lower_steps):
                task.draw()
                inner.step(task.lower_loss(copy))
            (task.logits.grad,) = torch.autograd.grad(task.upper_loss(copy), task.logits)
            upper_rule.step()
            with torch.no_grad():  # higher leaves the copying back to its users
                for index, (kept, moved) in enumerate(
                    zip(task.lower, copy.parameters(), strict=True)
                ):
                    kept.copy_(moved)
                    lower_rule.state[kept] = {
                        name: value.detach() if isinstance(value, Tensor) else value
                        for name, value in inner.state[0][index].items()
                    }

    return step


class Method(NamedTuple):
    """How to start a method, whose it is, and what its grid is."""

    start: Callable[[Task, Rates], Step]
    group: str
    """ours, ours (reference) or peer."""
    lower_steps: tuple[int, ...]
    lower_lr_scale: float = 1.0
    """100 for plain SGD in place of Adam."""


_cg, _inverse = torchopt.linear_solve.solve_cg, torchopt.linear_solve.solve_inv
# Added to H. Without it CG meets negative curvature and the weights are no better than chance (5
# iterations of torchopt, tuning seed: 0.55 told right after 2 s; 0.80 with 0.1, 0.79 with 1). Ours
# refuses negative curvature instead of passing through it and does so even at 0.1.
RIDGE, DAMPING = 0.1, 1.0

METHODS = {
    "penalty (default)": Method(penalty, "ours", (1, 5)),
    "penalty, value gap": Method(
        partial(penalty, penalty="value", curvature="finite_difference"), "ours", (1, 5)
    ),
    "Hypergradient, CG 10": Method(
        partial(hypergradient, method="cg", inner_iterations=10, damping=DAMPING),
        "ours (reference)",
        (1, 5),
    ),
    "Hypergradient, reverse": Method(
        partial(hypergradient, method="reverse"), "ours (reference)", (1, 5), 100.0
    ),
    "Hypergradient, one step": Method(
        partial(hypergradient, method="one_step"), "ours (reference)", (1, 5)
    ),
    "torchopt CG 5": Method(partial(implicit, solve=_cg(maxiter=5, ridge=RIDGE)), "peer", (1, 5)),
    "torchopt CG 20": Method(partial(implicit, solve=_cg(maxiter=20, ridge=RIDGE)), "peer", (1, 5)),
    "torchopt Neumann 10": Method(
        partial(implicit, solve=_inverse(ns=True, maxiter=10, alpha=0.1)), "peer", (1, 5)
    ),
    "higher unrolled 1": Method(unrolled, "peer", (1,)),
    "higher unrolled 5": Method(unrolled, "peer", (5,)),
}
