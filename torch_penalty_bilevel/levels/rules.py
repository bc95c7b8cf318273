r"""Options of a torch rule that change which problem a level solves.

Coupled weight decay of the lower rule adds wd v to the gradient: v then minimises

.. math:: g(u, v) + \sum_i \tfrac{wd_i}{2} \lVert v_i \rVert^2

and not g. So it is taken into g, where every derivative sees it, and out of the rule. What moves
v in another way, decoupled decay or ``maximize``, has no such loss and is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from ..curvature import Loss
from ..curvature import autograd_graph as graph
from ..curvature.micro_batches import each, plus
from ..errors import warn
from ..tensors import Tensors
from .around import around
from .groups import Level, names, parameters
from .joined import Together, parts

_COUPLED = (
    optim.SGD,
    optim.Adam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.NAdam,
    optim.RAdam,
    optim.ASGD,
)


def check(rule: Optimizer, level: Level, lower_is_map: bool = False) -> None:
    """Raise ``ValueError`` for an option that changes the level's problem behind its back."""
    for part in parts(rule):
        for group in part.param_groups:
            check_group(part, group, level, lower_is_map)


def check_group(
    rule: Optimizer, group: dict[str, Any], level: Level, lower_is_map: bool = False
) -> None:
    """The same for one group, which ``rule`` may not have yet."""
    kind = type(rule).__name__
    if group.get("maximize"):
        raise ValueError(
            f"{level} is {kind} with maximize=True: the level would climb a loss that all the rest "
            f"of the method descends; pass maximize=False and return -loss from {level}_closure"
        )
    if level == "upper":
        return
    decay, lambd = group.get("weight_decay", 0.0), group.get("lambd", 0.0)
    if lambd and isinstance(rule, optim.ASGD):
        raise ValueError(
            f"lower is ASGD with lambd={lambd}, which shrinks v after its step, so that v does not "
            "minimise g; pass lambd=0 (its default is not) and put lambd / 2 * "
            "sum(p.square().sum() for p in parameters) in the lower loss"
        )
    if not decay:
        return
    if not _is_coupled(rule, group):
        raise ValueError(
            f"lower is {kind} with weight_decay={decay} decoupled from the gradient, so that v "
            "does not minimise g; pass weight_decay=0 (the default of AdamW and Muon is not 0) and "
            f"put 0.5 * {decay} * sum(p.square().sum() for p in parameters) in the lower loss"
        )
    if lower_is_map:
        raise ValueError(
            f"lower is {kind} with weight_decay={decay}, but a lower level given as a map has no "
            "loss to which it could belong; pass weight_decay=0 and let Phi shrink v"
        )


def _is_coupled(rule: Optimizer, group: dict[str, Any]) -> bool:
    """Does the rule add wd p to the gradient, before all else? Of an unknown one: no."""
    # Not by the class that holds it: torch wraps ``step`` in the first class that is built.
    step = inspect.unwrap(type(rule).step)
    known = any(step is inspect.unwrap(kind.step) for kind in _COUPLED)
    return known and not group.get("decoupled_weight_decay", False)


def with_decay(loss: Loss, rule: Optimizer) -> Loss:
    """The loss g plus wd_i / 2 ||v_i||^2 for every v_i that moves and that g uses.

    As in torch, where a parameter without a gradient does not decay. The groups are read at
    each evaluation.
    """
    used: list[list[bool]] = []  # by the parts evaluated since the last decay

    def watched(part: Loss) -> Loss:
        def value_of_part(upper: Tensors, lower: Tensors) -> Tensor:
            value = part(upper, lower)
            if any(_decays(rule)):
                used.append(graph.reached([value], lower))
            return value

        return value_of_part

    def decays(upper: Tensors, lower: Tensors, plain: Tensor) -> list[Tensor]:
        uses = [any(parts) for parts in zip(*used, strict=True)]
        used.clear()
        found: list[Tensor] = []
        for parameter, decay, is_used in zip(lower, _decays(rule), uses, strict=False):
            if decay and is_used:
                wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
                found.append((0.5 * decay * wide.square().sum()).to(plain.device))
        return found

    return plus(each(watched, loss), decays)


def _decays(rule: Optimizer) -> list[Any]:
    """One for each parameter that moves."""
    return [
        group.get("weight_decay", 0.0)
        for group in rule.param_groups
        for p in group["params"]
        if p.requires_grad
    ]


def step_without_decay(rule: Optimizer) -> None:
    """``rule.step()`` on gradients that hold the decay already; its hooks see the option."""
    if isinstance(rule, Together):
        return rule.step_by(step_without_decay)
    with around(rule, functools.partial(_without_decay, rule)):
        rule.step()


@contextlib.contextmanager
def _without_decay(rule: Optimizer) -> Generator[None]:
    held = [(g, g["weight_decay"]) for g in rule.param_groups if g.get("weight_decay", 0.0)]
    for group, _ in held:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in held:
            group["weight_decay"] = decay


def rates(rule: Optimizer, name: str) -> set[float | None]:
    """What a rule's groups say under ``name``; None where they do not."""
    return {None if name not in group else float(group[name]) for group in rule.param_groups}


def rate_left(rule: Optimizer) -> float:
    """What schedules have left of the rates: the least share of a group, in [0, 1].

    torch's schedulers keep a group's first rate as "initial_lr". A rate of 0 holds its parameters
    where they are, with a scheduler or without.
    """
    shares: list[float] = []
    for group in rule.param_groups:
        if "lr" not in group:  # of a rule of one's own, which no schedule shortens
            continue
        rate, first = float(group["lr"]), float(group.get("initial_lr", 0.0))
        shares.append(min(1.0, rate / first) if first > 0 else float(rate != 0.0))
    return min(shares, default=1.0)


def warn_of_coarse(lower: Optimizer) -> None:
    """Warn of lower parameters too coarse to settle."""
    coarse = [
        name
        for name, p in zip(names(lower, "lower"), parameters(lower), strict=True)
        if p.requires_grad and torch.finfo(p.dtype).bits <= 16
    ]
    if coarse:
        warn(
            f"the lower parameters {coarse} have 16 bits: steps below some thousandths of a "
            "parameter are rounded away, so v does not settle and the certificate stays large. "
            "Keep them in float32 and compute in 16 bits by torch.autocast inside the closures",
        )


def warn_of_lost_moves(upper: Optimizer) -> None:
    """Warn of 16-bit upper parameters so large that a move by the learning rate is rounded away.

    Half a unit of rounding is eps / 4 of an entry at least; Adam moves by about its rate.
    """
    labels = dict(zip(map(id, parameters(upper)), names(upper, "upper"), strict=True))
    for group in upper.param_groups:
        rate = float(group.get("lr", 0.0))  # a rule of one's own may have none, or another name
        for u in group["params"]:
            if torch.finfo(u.dtype).bits > 16 or not (u.requires_grad and u.numel()):
                continue
            least = torch.finfo(u.dtype).eps / 4 * float(u.detach().abs().max())
            if 0 < rate < least:
                warn(
                    f"the upper parameter {labels[id(u)]!r} has 16 bits and entries so large that "
                    f"moves below {least:.2g} are rounded away, and its learning rate is {rate:g}: "
                    "it may never move. Keep it in float32, or center it at 0",
                )
