"""Which parameters the losses depend on: by graphs and, where these are cut, by a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..curvature import Curvature, FiniteDifference, Loss
from ..curvature import autograd_graph as graph
from ..curvature.double_backward import residual_graph
from ..curvature.micro_batches import parts_of
from ..curvature.refusals import hidden_dependence, refuse_reentrant_checkpoint
from ..errors import DoubleBackwardError, NondeterministicClosureError
from ..linear_solve import random_direction
from ..penalties import Losses
from ..tensors import OptionalTensors, Pair, Tensors, cast_like, is_sharded, norm
from ..undo.random_state import RandomState
from ..workers import Workers


class Dependence(NamedTuple):
    """For each upper parameter: is it in the graph of f, and in that of the residual r?

    And for each lower one: is it in the graph of g, and in that of f?
    """

    upper_loss: list[bool]
    residual: list[bool]
    lower: list[bool]
    slope: list[bool]


def dependence(losses: Losses, at: Pair, lower_is_map: bool, engine: Curvature) -> Dependence:
    """Which upper parameters f and r depend on, and which lower ones g and f, or any part of them.

    By their graphs. That of r holds twice the activations of a plain gradient; where the
    engine takes differences, and need not, it is made only if a difference finds no dependence.
    Where torch refuses to make it, or it stops short of a parameter, a difference decides.

    Raises:
        ValueError: g does not depend on the lower parameters.
        DoubleBackwardError: r has no graph, or one that hides a dependence, which the engine needs.
    """
    in_f = _any_of([_direct(part, at) for part in parts_of(losses.upper)])
    in_upper_loss, slope = in_f[: len(at.upper)], in_f[len(at.upper) :]
    parts = parts_of(losses.lower)
    found = [_of_lower(part, in_upper_loss, at, lower_is_map, engine) for part in parts]
    if len(parts) > 1:
        engine.in_use.renew()  # it has seen parts, and not yet their mean
    residual, lower = (_any_of(uses) for uses in zip(*found, strict=True))
    return Dependence(in_upper_loss, residual, lower, slope)


def _any_of(parts: Sequence[list[bool]]) -> list[bool]:
    return [any(uses) for uses in zip(*parts, strict=True)]


def _direct(upper: Loss, at: Pair) -> list[bool]:
    upper_loss = upper(*at)
    refuse_reentrant_checkpoint(upper_loss)
    return graph.reached([upper_loss], (*at.upper, *at.lower))


def _of_lower(
    loss: Any, in_upper_loss: list[bool], at: Pair, lower_is_map: bool, engine: Curvature
) -> tuple[list[bool], list[bool]]:
    """Which upper parameters r depends on, and which lower ones g."""
    if lower_is_map:  # r = v - Phi depends on every v
        return graph.reached(list(loss(*at)), at.upper), [True] * len(at.lower)
    in_lower_loss: list[bool] = []

    def watched(upper: Tensors, lower: Tensors) -> Tensor:
        value = loss(upper, lower)
        in_lower_loss[:] = in_lower_loss or graph.reached([value], at.lower)
        return value

    differences = engine.takes_differences
    responds = [False] * len(at.upper)
    if differences:
        responds = _responds(watched, at, engine.in_use).upper
        complete = all(d or r for d, r in zip(in_upper_loss, responds, strict=True))
        if (complete and any(responds)) or any(map(is_sharded, at.lower)):
            return responds, in_lower_loss
    random = RandomState(p.device for p in (*at.upper, *at.lower))
    try:
        residual, custom = _residual(loss, at)
    except DoubleBackwardError:
        if not (differences or engine.falls_back):
            raise
        with random.replayed():
            responds = _responds(watched, at, _one_sided()).upper
            return responds, in_lower_loss
    reached = graph.reached([r for r in residual if r is not None], at.upper)
    with random.replayed():
        if not differences:
            responds = _beyond(reached, residual, custom, loss, at, engine)
        elif not all(reached):
            responds = _responds(loss, at, _one_sided()).upper
    in_residual = [a or b for a, b in zip(reached, responds, strict=True)]
    return in_residual, [r is not None for r in residual]


def shared_dependence(
    losses: Losses, at: Pair, lower_is_map: bool, engine: Curvature, workers: Workers
) -> Dependence:
    """``dependence`` of the losses of any worker; raises on all of them what it raises on one."""
    none = Dependence(*([False] * len(part) for part in (at.upper, at.upper, at.lower, at.lower)))
    own = workers.attempt(lambda: dependence(losses, at, lower_is_map, engine), lambda: none)
    flags = iter(workers.agreed([flag for part in own for flag in part], at.lower[0]))
    return Dependence(*([next(flags) for _ in part] for part in own))


def _beyond(
    reached: Sequence[bool],
    residual: OptionalTensors,
    custom: str | None,
    lower: Loss,
    at: Pair,
    engine: Curvature,
) -> list[bool]:
    """Which upper parameters r depends on although its graph does not say so.

    A custom function whose backward pass is not differentiable leaves no trace but an entry of r
    without a graph, as a constant one, or a parameter that r does not reach. Then a difference is
    taken, and what it sees the engine must not miss.
    """
    cut = [r is not None and not r.requires_grad for r in residual]
    if all(reached) and not any(cut):
        return list(reached)
    try:
        found = _responds(lower, at, _one_sided(), cut if all(reached) else None)
    except NondeterministicClosureError:
        return list(reached)  # other data in every call: nothing to compare
    hidden = [there and not seen for there, seen in zip(found.upper, reached, strict=True)]
    refuted = any(hidden) or (all(reached) and any((*found.upper, *found.lower)))
    # A custom function it finds by itself, and says so.
    if refuted and (custom is None or not engine.falls_back):
        engine.refute(hidden_dependence(custom))
    return found.upper


def _one_sided() -> FiniteDifference:
    """To see whether anything changes: g even in v would fool a central difference at v = 0."""
    return FiniteDifference(central=False)


class _Responses(NamedTuple):
    """For each parameter: is its part of the product anything but exactly zero?"""

    upper: list[bool]
    lower: list[bool]


def _responds(
    lower: Loss, at: Pair, engine: Curvature, only: Sequence[bool] | None = None
) -> _Responses:
    """Are J q and H q anything but exactly zero? If so, r depends on the parameter.

    q is r or, where that vanishes, a random direction; with ``only``, in these tensors of v.
    """
    linearised = engine.linearise(lower, at)
    direction = _masked(linearised.residual, only)
    if float(norm(direction)) == 0:
        direction = _masked(random_direction(at.lower), only)
    product = linearised.product(cast_like(direction, at.lower))
    return _Responses(*([t is not None and float(norm([t])) != 0 for t in p] for p in product))


def _masked(direction: Tensors, only: Sequence[bool] | None) -> Tensors:
    if only is None:
        return direction
    return tuple(d if o else torch.zeros_like(d) for d, o in zip(direction, only, strict=True))


def _residual(lower: Loss, at: Pair) -> tuple[OptionalTensors, str | None]:
    """The entries of grad_v g, with their graph, and the name of a custom function behind g."""
    loss = lower(*at)
    refuse_reentrant_checkpoint(loss)
    residual = residual_graph(loss, at.lower)
    if all(r is None for r in residual):
        raise ValueError(
            "the lower loss does not depend on any lower parameter; are the two closures swapped, "
            "or were the layers replaced after the optimizer was built?"
        )
    return residual, graph.custom_function(loss)
