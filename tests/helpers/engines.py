"""Every engine by name, how exact it is, and its products of a network problem."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from networks import NetProblem, exact_products, net_problem
from problems import join, leaves
from torch import Tensor

from torch_penalty_bilevel.curvature import (
    Automatic,
    DoubleBackward,
    FiniteDifference,
    VectorJacobian,
)
from torch_penalty_bilevel.tensors import OptionalPair, Pair, filled

ENGINES: dict[str, Callable[[], Any]] = {
    "double_backward": DoubleBackward,
    "auto": Automatic,
    "functional": VectorJacobian,
    "central": FiniteDifference,
    "forward": lambda: FiniteDifference(central=False),
}
LIVE = ("double_backward", "auto", "central", "forward")

# Relative error of a product in float64. Exact engines: rounding. Differences of gradients with
# a relative step h carry rounding eps / h, here up to a factor 30 for the size of the gradient
# beside H q, and truncation: h^2 (central, 6e-6) or h (forward, 1e-7) times curvature's change.
TOL = {"double_backward": 1e-10, "auto": 1e-10, "functional": 1e-10, "central": 5e-9}
TOL["forward"] = 5e-6


def filled_pair(product: OptionalPair, at: Pair) -> Pair:
    return Pair(filled(product.upper, at.upper), filled(product.lower, at.lower))


def relative_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    a, b = join(actual).double(), join(expected).double()
    return float((a - b).norm() / b.norm())


def point_for(name: str, at: Pair) -> Pair:
    if name == "functional":  # no outer graph around torch.func's
        return Pair(tuple(t.detach() for t in at.upper), tuple(t.detach() for t in at.lower))
    return Pair(leaves(at.upper), leaves(at.lower))


def products_of(engine: Any, problem: NetProblem, direction: tuple[Tensor, ...]) -> Pair:
    loss = problem.pure if isinstance(engine, VectorJacobian) else problem.closure
    at = problem.at
    if isinstance(engine, VectorJacobian):
        at = Pair(tuple(t.detach() for t in at.upper), tuple(t.detach() for t in at.lower))
    return filled_pair(engine.linearise(loss, at).product(direction), at)


@functools.cache
def exact(name: str) -> Pair:
    problem = net_problem(name)
    return exact_products(problem, problem.direction())
