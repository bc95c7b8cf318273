"""What profiles are made of: evaluations until solved, shares, ratios, and the one setting.

Solved at tau is Moré & Wild's test, F(u) - F* <= tau (F(u_0) - F*).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from examples.shared.record import Line

Setting = TypeVar("Setting")
Costs = Mapping[str, Sequence[float]]
"""By solver, evaluations until solved per problem and seed in one order; inf where never."""


def best_known(results: Sequence[Line]) -> float:
    """F* of one problem from one seed: the known optimum, else the least F that any run saw."""
    if results[0]["best"] is not None:
        return results[0]["best"]
    return min(value for r in results for value in (r["first"], *(F for _, F in r["path"])))


def cost(result: Line, best: float, accuracy: float) -> float:
    """Evaluations at the first look that finds the problem solved; inf where none does."""
    if not math.isfinite(result["first"]):
        raise ValueError(f"F at the start is {result['first']}: nothing can be relative to it")
    bound = accuracy * (result["first"] - best)
    return next((float(spent) for spent, F in result["path"] if F - best <= bound), math.inf)


def shares(costs: Sequence[float], at: Sequence[float]) -> list[float]:
    """Share of the costs that are at most each number of ``at``."""
    ordered = sorted(costs)
    return [bisect.bisect_right(ordered, x) / len(ordered) for x in at]


def ratios(costs: Costs) -> dict[str, list[float]]:
    """Costs over the least of any solver on the same problem (Dolan & Moré, 2002)."""
    least = [min(column) for column in zip(*costs.values(), strict=True)]
    return {
        name: [c / low if c < math.inf else math.inf for c, low in zip(row, least, strict=True)]
        for name, row in costs.items()
    }


def one_setting(costs: Mapping[Setting, Sequence[float]], budget: float) -> Setting:
    """The setting that solves most; of several the one with the least mean log cost.

    Args:
        costs: of one solver, by setting: of all problems and accuracies.
        budget: the cost of what was not solved.
    """

    def merit(setting: Setting) -> tuple[int, float]:
        row = costs[setting]
        solved = sum(c < math.inf for c in row)
        return solved, -sum(math.log(min(c, budget)) for c in row)

    return max(costs, key=merit)
