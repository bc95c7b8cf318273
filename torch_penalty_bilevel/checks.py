"""Suspicions: parameters that nothing depends on, and hypergradients that are exactly zero."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import graph
from .curvature import Curvature, Loss, takes_differences
from .curvature.double_backward import explained, refuse_reentrant_checkpoint
from .errors import BilevelWarning, UnusedParameterError
from .penalties import Losses
from .randomness import RandomState
from .tensors import OptionalTensors, Pair, Tensors, cast_like, norm


def check_count(name: str, value: Any, at_least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}")


class Dependence(NamedTuple):
    """For each upper parameter: is it in the graph of f, and in that of the residual r?

    And for each lower one: is it in the graph of g?
    """

    upper_loss: list[bool]
    residual: list[bool]
    lower: list[bool]


def dependence(losses: Losses, at: Pair, lower_is_map: bool, engine: Curvature) -> Dependence:
    """Which upper parameters f and r depend on, and which lower ones g.

    By their graphs. That of r holds twice the activations of a plain gradient; where the
    engine takes differences, and need not, it is made only if a difference finds no dependence.

    Raises:
        ValueError: g does not depend on the lower parameters.
    """
    upper_loss = losses.upper(*at)
    refuse_reentrant_checkpoint(upper_loss)
    in_upper_loss = graph.reached([upper_loss], at.upper)
    del upper_loss
    if takes_differences(engine) and not lower_is_map:
        in_lower_loss: list[bool] = []

        def watched(upper: Tensors, lower: Tensors) -> Tensor:
            value = losses.lower(upper, lower)
            in_lower_loss[:] = in_lower_loss or graph.reached([value], at.lower)
            return value

        responds = _responds(watched, at, engine)
        if all(d or r for d, r in zip(in_upper_loss, responds, strict=True)) and any(responds):
            return Dependence(in_upper_loss, responds, in_lower_loss)
    if lower_is_map:  # r = v - Phi depends on every v
        image = list(losses.lower(*at))
        return Dependence(in_upper_loss, graph.reached(image, at.upper), [True] * len(at.lower))
    slopes = _residual(losses.lower, at)
    residual = [r for r in slopes if r is not None]
    in_residual = graph.reached(residual, at.upper)
    return Dependence(in_upper_loss, in_residual, [r is not None for r in slopes])


def _responds(lower: Loss, at: Pair, engine: Curvature) -> list[bool]:
    """Is J r anything but exactly zero? If so, r depends on the parameter."""
    linearised = engine.linearise(lower, at)
    through = linearised.product(cast_like(linearised.residual, at.lower)).upper
    return [part is not None and float(norm([part])) != 0 for part in through]


def check_dependence(
    losses: Losses,
    at: Pair,
    names: Sequence[str],
    allow_unused: bool,
    lower_is_map: bool,
    engine: Curvature,
) -> Dependence:
    """Look once through the graphs of f and r for upper parameters that neither depends on.

    Warns if r depends on none at all: then v does not respond to u and the closures may be swapped.

    Raises:
        UnusedParameterError: naming the parameters, unless ``allow_unused``.
        ValueError: g does not depend on the lower parameters.
    """
    random = RandomState(p.device for p in (*at.upper, *at.lower))
    found = dependence(losses, at, lower_is_map, engine)
    random.restore()  # so that a resumed run, which checks again, draws the same numbers
    unused = [
        name
        for name, direct, indirect in zip(names, found.upper_loss, found.residual, strict=True)
        if not direct and not indirect
    ]
    if unused and not allow_unused:
        raise_unused(unused)
    if names and not any(found.residual):
        warnings.warn(
            f"{'Phi' if lower_is_map else 'grad_v g'} does not depend on any upper parameter, so v "
            "does not respond to u and the hypergradient is the plain gradient of f; are the two "
            "closures swapped?",
            BilevelWarning,
            stacklevel=6,
        )
    return found


class DependenceWatch:
    """Looks at what the losses depend on: at first, and when a lower tensor has fallen silent."""

    _PATIENCE = 20
    """Evaluations in a row without any gradient, after which to look again."""

    def __init__(self) -> None:
        self.due = True
        self._silent: list[int] = []
        self._named: set[str] = set()

    def look(
        self,
        losses: Losses,
        at: Pair,
        names: Sequence[str],
        lower_names: Sequence[str],
        allow_unused: bool,
        lower_is_map: bool,
        engine: Curvature,
    ) -> None:
        """If it is time to, and warn, once of each, of lower parameters that g does not use.

        Raises what ``check_dependence`` does.
        """
        if not self.due:
            return
        found = check_dependence(losses, at, names, allow_unused, lower_is_map, engine)
        self.due = False
        missing = [n for n, used in zip(lower_names, found.lower, strict=False) if not used]
        if new := [n for n in missing if n not in self._named]:
            self._named.update(new)
            warnings.warn(
                f"the lower loss does not depend on the lower parameters {new}, so nothing trains "
                "them: was a layer replaced after the optimizer was built (add the new one by "
                "add_param_group), is a part of the network not used, or not in this batch?",
                BilevelWarning,
                stacklevel=5,
            )

    def listen(self, silent: Sequence[bool]) -> None:
        """Of each lower tensor: did an evaluation give no gradient at all?"""
        if len(self._silent) != len(silent):
            self._silent = [0] * len(silent)
        if any(silent) or any(self._silent):
            pairs = zip(self._silent, silent, strict=True)
            self._silent = [count + 1 if is_silent else 0 for count, is_silent in pairs]
            self.due = self.due or self._PATIENCE in self._silent


def _residual(lower: Loss, at: Pair) -> OptionalTensors:
    """grad_v g, with its graph."""
    loss = lower(*at)
    refuse_reentrant_checkpoint(loss)
    with explained():
        slopes = cast(
            OptionalTensors,
            torch.autograd.grad(loss, at.lower, create_graph=True, allow_unused=True),
        )
    if all(r is None for r in slopes):
        raise ValueError(
            "the lower loss does not depend on any lower parameter; are the two closures swapped, "
            "or were the layers replaced after the optimizer was built?"
        )
    return slopes


def raise_unused(names: Sequence[str], direct_only: bool = False) -> None:
    """Say which parameters nothing depends on, or ``direct_only`` not f."""
    who = "the method follows grad_u f alone, and the upper loss does not depend"
    if not direct_only:
        who = "neither the upper loss nor the residual of the lower level depends"
    remedy = "use another method" if direct_only else "use them in a closure"
    raise UnusedParameterError(
        f"{who} on {list(names)}; {remedy}, freeze them with requires_grad_(False), or pass "
        "allow_unused=True"
    )


def zeros_in_a_row(before: int, vanished: bool) -> int:
    """Count hypergradients of exactly zero although the multiplier is not; warn of the third.

    Once is a coincidence of symmetric starts. After the warning the count stays at three.
    """
    if before == 3:
        return 3
    count = before + 1 if vanished else 0
    if count == 3:
        warnings.warn(
            "the hypergradient was exactly zero three times in a row: either u is at a stationary "
            "point, or the losses do not see it (a detach, an argmax, a rounding or a dead "
            "activation on the way?)",
            BilevelWarning,
            stacklevel=5,
        )
    return count
