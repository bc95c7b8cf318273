r"""Several runs of ``minimize`` on one budget: other starts, other wells, and cuts.

A run that ends with another lower minimiser in sight is followed up, once per solution:

- from that minimiser, if it is as low or lower;
- by the problem that keeps v in the well with the smaller upper loss, w in the other one, and
  admits only those u at which v is as low as w,

.. math:: \min_u f(u, v) \quad\text{where}\quad v, w \in \arg\min g(u, \cdot)
    \text{ locally}, \quad g(u, v) \le g(u, w)

The latter reaches solutions on a jump of the lower minimiser (compare Mitsos, Lemonidis & Barton,
2008, who cut with fixed points in a branch and bound).

The other starts are random: uniform in a box, normal around the best solution with the standard
deviations 1/2, 1, 2, 4, 1/2, ... of (1 + its root mean square) elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..constraints import Inequality
from .barrier import as_list
from .counted_losses import PureLoss
from .result import MinimizeResult

FEASIBLE = ("converged", "flat_upper", "weakly_active", "stalled", "lower_tie", "unbounded")
SPREAD = (0.5, 1.0, 2.0, 4.0)
LOCAL = 1e-4  # barrier weight at the start of all runs but the first, which keeps them nearby
SAME = 1e-4  # relative distance under which two solutions are one


class Task(NamedTuple):
    """A problem with a start, in the user's terms."""

    upper_loss: PureLoss
    lower_loss: PureLoss
    upper: Any
    lower: Any
    upper_constraint: Any
    lower_constraint: Any
    restore: Callable[[MinimizeResult], MinimizeResult] = lambda result: result
    """Its result as one of the problem it came from."""
    cut: bool = False
    """Is it one with a cut?"""
    weight: float = 0.1
    """Of the barrier at the start: the larger, the less the start matters."""


class Ended(NamedTuple):
    """How a run ended."""

    result: MinimizeResult
    rival: Any
    """Another lower minimiser at its u, if one was seen."""
    checked: bool
    """Did the evaluations last for looking for one?"""


Run = Callable[[Task, int, int], Ended]
"""(task, evaluations allowed, evaluations before) -> how it ended."""


def search(run: Run, task: Task, restarts: int, seed: int, limit: int) -> MinimizeResult:
    """The best of at most 1 + ``restarts`` runs of together at most ``limit`` evaluations."""
    generator = torch.Generator().manual_seed(seed)
    ended, waiting = list[Ended](), [task]
    longest = spent = drawn = 0
    for _ in range(1 + restarts):
        if limit - spent < longest:  # it would hardly end
            break
        if waiting:
            now = waiting.pop(0)
        else:
            now = _elsewhere(task, _best(ended), SPREAD[drawn % len(SPREAD)], generator)
            drawn += 1
        found = run(now, limit - spent, spent)
        result = now.restore(found.result)
        longest, spent = max(longest, result.evaluations - spent), result.evaluations
        if result.status == "stopped":
            return result
        new = all(_apart(result, other.result) for other in ended)
        if found.rival is not None and new and not now.cut:
            waiting += _follow_ups(now, result, found.rival)
        ended.append(found._replace(result=result))
    return dataclasses.replace(_best(ended), evaluations=spent, solutions=_distinct(ended))


def _best(ended: list[Ended]) -> MinimizeResult:
    """The least upper loss among those with a lower minimiser.

    Near-ties go to "flat_upper": what one run found undetermined, another only stopped short of.
    Then to "converged".
    """
    sound = [e for e in ended if e.result.status in FEASIBLE]
    sound = [e.result for e in sound if e.checked] or [e.result for e in sound]
    if not sound:
        return ended[0].result
    least, size = min(r.upper_loss for r in sound), max(abs(r.upper_loss) for r in sound)
    near = [r for r in sound if r.upper_loss <= least + 1e-8 * size]
    return min(near, key=lambda r: (r.status != "flat_upper", not r.converged, r.upper_loss))


def _distinct(ended: list[Ended]) -> int:
    """How many different points converged."""
    kept = list[MinimizeResult]()
    for r in (e.result for e in ended):
        if r.converged and all(_apart(r, other) for other in kept):
            kept.append(r)
    return len(kept)


def _apart(result: MinimizeResult, other: MinimizeResult) -> bool:
    x, y = (
        torch.cat([t.double().cpu().reshape(-1) for t in pytree.tree_leaves((r.upper, r.lower))])
        for r in (result, other)
    )
    return len(x) != len(y) or float((x - y).norm()) > SAME * (1 + float(y.norm()))


def _follow_ups(task: Task, result: MinimizeResult, rival: Any) -> list[Task]:
    """What another lower minimiser suggests to try."""
    u, v = result.upper, result.lower
    if result.status == "lower_not_global":
        return [_cut(task, result, (v, rival)), _there(task, u, rival)]
    if result.status == "lower_tie":
        return [_cut(task, result, (rival, v)), _there(task, u, rival)]
    return [_cut(task, result, (rival, v))]  # the other well is deeper, f smaller


def _there(task: Task, upper: Any, lower: Any) -> Task:
    return task._replace(upper=upper, lower=lower, weight=LOCAL)


def _cut(task: Task, result: MinimizeResult, lower: tuple[Any, Any]) -> Task:
    """The problem in (u, (v, w)) with g(u, v) <= g(u, w), from the result's u and ``lower``."""
    f, g, upper = task.upper_loss, task.lower_loss, result.upper
    with torch.no_grad():  # a unit for g
        seen = [float(g(upper, w)) for w in lower] + [float(g(task.upper, task.lower))]
    unit = max(abs(x - result.lower_loss) for x in seen) or 1.0

    def restore(found: MinimizeResult) -> MinimizeResult:
        v, _ = found.lower
        with torch.no_grad():
            g_v = float(g(found.upper, v))
        note = "; at this u the lower loss has a second minimiser that is as deep"
        return task.restore(
            dataclasses.replace(
                found,
                lower=v,
                multiplier=found.multiplier[0],
                lower_loss=g_v,
                message=found.message + note,
            )
        )

    level = lambda u, pair: ((g(u, pair[0]) - g(u, pair[1])) / unit).reshape(1)  # noqa: E731
    return Task(
        lambda u, pair: f(u, pair[0]),
        lambda u, pair: g(u, pair[0]) + g(u, pair[1]),
        upper,
        lower,
        [*(_of_pair(c, 1) for c in as_list(task.upper_constraint)), Inequality(level)],
        [_of_pair(c, 2) for c in as_list(task.lower_constraint)],
        restore,
        True,
        LOCAL,
    )


def _of_pair(constraint: Any, first: int) -> Any:
    """A constraint on v as one on the first ``first`` of (v, w)."""
    if not hasattr(constraint, "closure"):
        return constraint
    h = constraint.closure
    return Inequality(lambda u, pair: torch.cat([h(u, v).reshape(-1) for v in pair[:first]]))


def _elsewhere(task: Task, best: MinimizeResult, spread: float, generator: torch.Generator) -> Task:
    def draw(tree: Any, constraint: Any) -> Any:
        given = as_list(constraint)
        return pytree.tree_map(lambda x: _draw(x, given, spread, generator), tree)

    return task._replace(
        upper=draw(best.upper, task.upper_constraint),
        lower=draw(best.lower, task.lower_constraint),
        weight=LOCAL,
    )


def _draw(x: Tensor, constraints: list[Any], spread: float, generator: torch.Generator) -> Tensor:
    x = x.detach()
    unit = spread * (1 + float(x.double().square().mean().sqrt()))
    drawn = x + unit * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    for c in constraints:
        if hasattr(c, "low"):
            low, high = c.low.to(x).expand_as(x), c.high.to(x).expand_as(x)
            share = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
            drawn = torch.where((high - low).isfinite(), low + share * (high - low), drawn)
        if hasattr(c, "project"):
            drawn = c.project(drawn)
    return drawn
