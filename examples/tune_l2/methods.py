"""The methods of ``tune_l2`` with their knobs, and each one's optimizer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from examples.shared.record import Line
from examples.tune_l2.problem import Problem
from torch_penalty_bilevel import (
    HypergradientOptimizer,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
    ValueGap,
)
from torch_penalty_bilevel.constraints import Box

PENALTIES: dict[str, Callable[[], Stationarity | ValueGap]] = {
    "penalty": Stationarity,
    "penalty_no_pull": lambda: Stationarity(LeastSquares(share=0.0)),
    "value": ValueGap,
}
METHODS = (
    *PENALTIES,
    *("cg", "neumann", "fixed_point", "approx_grad", "reverse"),
    *("one_step", "alternating"),
)
ITERATIVE = ("cg", "neumann", "fixed_point", "approx_grad")
GRID = {"upper_lr": (0.03, 0.1), "lower_lr": (0.1, 0.3), "lower_steps": (1, 10)}
REVERSE_LOWER = {0.1: 0.5, 0.3: 1.0}  # gradient steps instead, in units of 1 / curvature
TUNING_SEED = 100
TUNED: dict[str, dict[str, tuple[float, float, int]]] = {
    # The corner of the grid for all that were tried; one_step and approx_grad follow the others.
    "newsgroups": {method: (0.1, 0.3, 10) for method in METHODS},
    "gas": {  # with --budget 400
        "penalty": (0.03, 0.3, 1),
        "penalty_no_pull": (0.03, 0.3, 1),
        "value": (0.03, 0.1, 1),
        "cg": (0.1, 0.1, 10),
        "neumann": (0.1, 0.3, 10),
        "fixed_point": (0.1, 0.3, 10),
        "approx_grad": (0.03, 0.1, 10),
        "reverse": (0.03, 0.1, 10),
        "one_step": (0.1, 0.1, 10),
    },
    "breastcancer": {  # with --budget 400
        "penalty": (0.1, 0.3, 1),
        "penalty_no_pull": (0.1, 0.3, 1),
        "value": (0.1, 0.1, 1),
        "cg": (0.1, 0.1, 1),
        "neumann": (0.1, 0.3, 1),
        "fixed_point": (0.1, 0.3, 1),
        "approx_grad": (0.1, 0.1, 1),
        "reverse": (0.1, 0.3, 1),
        "one_step": (0.1, 0.1, 1),
    },
}
LEAST = -4.0  # of u
Optimizer = PenaltyBilevelOptimizer | HypergradientOptimizer


def make_optimizer(problem: Problem, u: Tensor, v: Tensor, setting: Line) -> Optimizer:
    """The optimizer of ``setting``: method, upper_lr, lower_lr, lower_steps."""
    method, lower_lr = setting["method"], setting["lower_lr"]
    common = {
        "upper_lr": setting["upper_lr"],
        "lower_steps": setting["lower_steps"],
        "curvature": "double_backward",  # "auto" trusts no custom product, this one is linear
        "upper_constraint": Box(LEAST, max(problem.largest, 0.0)),
    }
    if method in PENALTIES:
        penalty = PENALTIES[method]()
        return PenaltyBilevelOptimizer([u], [v], lower_lr=lower_lr, penalty=penalty, **common)
    # Cross entropy and L2 term curve by at most ``smoothness`` each.
    step = 1 / (2 * problem.smoothness)
    if method == "reverse":
        lower_lr = REVERSE_LOWER[lower_lr] * 2 * step
    elif method in ("neumann", "fixed_point", "one_step"):
        common["step_size"] = step
    if method in ITERATIVE:
        common["inner_iterations"] = setting["lower_steps"] + (method == "approx_grad")
    if method == "alternating":  # f does not depend on u directly, so it has nothing to follow
        common["allow_unused"] = True
    return HypergradientOptimizer([u], [v], method=method, lower_lr=lower_lr, **common)
