"""Suspicions: parameters that nothing depends on, and hypergradients that are exactly zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..curvature import Curvature
from ..curvature.micro_batches import parts_of
from ..errors import UnusedParameterError, warn
from ..penalties import Losses
from ..tensors import Pair
from ..undo.random_state import RandomState
from ..undo.scope import Scope
from ..workers import ALONE, Workers
from .dependence import Dependence, shared_dependence
from .first_look import FirstLook


def check_dependence(
    losses: Losses,
    at: Pair,
    names: Sequence[str],
    allow_unused: bool,
    lower_is_map: bool,
    engine: Curvature,
    workers: Workers = ALONE,
) -> Dependence:
    """Look once through the graphs of f and r for upper parameters that neither depends on.

    Warns if r depends on none at all: then v does not respond to u and the closures may be swapped.

    Raises:
        UnusedParameterError: naming the parameters, unless ``allow_unused``.
        ValueError: g does not depend on the lower parameters.
    """
    random = RandomState(p.device for p in (*at.upper, *at.lower))
    found = shared_dependence(losses, at, lower_is_map, engine, workers)
    random.restore()  # so that a resumed run, which checks again, draws the same numbers
    unused = [
        name
        for name, direct, indirect in zip(names, found.upper_loss, found.residual, strict=True)
        if not direct and not indirect
    ]
    if unused and not allow_unused:
        raise_unused(unused)
    if names and not any(found.residual):
        warn(
            f"{'Phi' if lower_is_map else 'grad_v g'} does not depend on any upper parameter, so v "
            "does not respond to u and the hypergradient is the plain gradient of f; are the two "
            "closures swapped?",
        )
    return found


class DependenceWatch:
    """Looks at what the losses depend on: at first, and when a lower tensor has fallen silent."""

    _PATIENCE = 20
    """Evaluations in a row without any gradient, after which to look again."""
    _is_told_of_upper = False
    """Was it said that f does not see v?"""

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
        scope: Scope,
        allow_unused: bool,
        lower_is_map: bool,
        engine: Curvature,
        workers: Workers = ALONE,
    ) -> Losses:
        """If it is time to, or if closures are new, at what they use and keep.

        Warns, once of each, of lower parameters that g does not use. Raises what
        ``check_dependence`` does. Returns losses for the evaluation at the same point, which need
        not call the closures again for what was seen, and say that they are new.
        """
        if scope.is_new and scope.has_searched:  # in mid run: another graph
            engine.renew()
        if not self.due and not scope.is_new:
            return losses
        if self.due:
            workers.check_alike((*at.upper, *at.lower), (*names, *lower_names))
        losses = losses._replace(are_new=True)
        seen = FirstLook(losses, at, engine) if self.due else None
        with scope.searching():
            if seen:
                how = allow_unused, lower_is_map, engine, workers
                found = check_dependence(seen.losses, at, names, *how)
                self._name_unused(lower_names, found)
                self._tell_of_upper(found)
            called = self.due
            workers.attempt(
                lambda: _check_kept_state(losses, at, scope, called=called), lambda: None
            )
        self.due = False
        if seen is None or scope.compiled:  # of which the search saw the uncompiled graph
            return losses
        seen.open()
        return seen.losses

    def _name_unused(self, lower_names: Sequence[str], found: Dependence) -> None:
        missing = [n for n, used in zip(lower_names, found.lower, strict=False) if not used]
        if new := [n for n in missing if n not in self._named]:
            self._named.update(new)
            warn(
                f"the lower loss does not depend on the lower parameters {new}, so nothing trains "
                "them: was a layer replaced after the optimizer was built (add the new one by "
                "add_param_group), is a part of the network not used, or not in this batch?",
            )

    def _tell_of_upper(self, found: Dependence) -> None:
        """By the graph: an f that is switched off by a factor of 0 sees v all the same."""
        if not any(found.slope) and not self._is_told_of_upper:
            self._is_told_of_upper = True
            warn(
                "the upper loss does not depend on any lower parameter, so v carries nothing from "
                "u to f and the hypergradient is grad_u f alone: was f computed from a copy of the "
                "model (copy.deepcopy, a snapshot, an average of weights), under no_grad, or from "
                "detached outputs? It has to use the tensors that were given as lower",
            )

    def listen(self, silent: Sequence[bool]) -> None:
        """Of each lower tensor: did an evaluation give no gradient at all?"""
        if len(self._silent) != len(silent):
            self._silent = [0] * len(silent)
        if any(silent) or any(self._silent):
            pairs = zip(self._silent, silent, strict=True)
            self._silent = [count + 1 if is_silent else 0 for count, is_silent in pairs]
            self.due = self.due or self._PATIENCE in self._silent


def _check_kept_state(losses: Losses, at: Pair, scope: Scope, called: bool) -> None:
    """Warn of tensors outside modules that a closure moves: they move with every evaluation.

    Those written into are named at once. One that a name was given anew may be a log or a
    state: it is a state if a repetition at the same point gives another value.

    Args:
        losses: f and g.
        at: (u, v).
        scope: searches, and has seen the closures run if ``called``; else they run now.
        called: see ``scope``.
    """
    random = RandomState(p.device for p in (*at.upper, *at.lower))

    def call() -> None:
        for loss in (losses.upper, losses.lower):
            with random.replayed():
                for part in parts_of(loss):
                    part(*at)

    if not called:
        call()
    suspects = scope.rebound
    if suspects:
        call()
        before = dict(suspects)
        call()
        suspects = {n: t for n, t in before.items() if not torch.equal(t, scope.rebound[n])}
    kept = [*scope.written, *suspects]
    if kept:
        warn(
            f"a closure moves {kept}, which it keeps between its calls: a step evaluates each "
            "closure several times, so a state of its own moves as often, and losses that read it "
            "are not the same function twice. Make it a buffer of a module "
            "(register_buffer; those move once per step), or move it outside the closure, after "
            "the step",
        )


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
        warn(
            "the hypergradient was exactly zero three times in a row: either u is at a stationary "
            "point, or the losses do not see it (a detach, an argmax, a rounding or a dead "
            "activation on the way?)",
        )
    return count
