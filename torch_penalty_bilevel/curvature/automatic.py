"""Double backward where it is right, finite differences where it is not or costs twice as much."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from ..errors import DoubleBackwardError, NondeterministicClosureError
from ..tensors import OptionalPair, Pair, Tensors, norm
from ..undo.random_state import RandomState
from . import comparison as evidence
from .alarm import Alarm
from .double_backward import DoubleBackward
from .finite_difference import FiniteDifference
from .inspection import UNSTEADY, Inspection, warn, with_plain_attention
from .micro_batches import MeanLoss, each
from .protocol import Curvature, Linearised, Loss, Map

_log = logging.getLogger(__name__)
_STEADY = 0.1


class Automatic(Curvature):
    """Start with double backward; go over to finite differences on evidence, and back.

    It must go over, with a warning, when torch says that an operation has no second derivative,
    when the graph holds one whose second derivative is known to be silently wrong, or a custom
    ``autograd.Function``, for which nothing vouches; and when differences agree with each other but
    not with double backward, as where a gradient made by a hook or under ``no_grad`` hides from the
    graph how it depends on v.

    It may, with ``weighs_costs``, where double backward moves more than twice the bytes (networks
    with LayerNorm or GroupNorm, LSTMs, attention) and both products agree to one per cent at the
    best of three relative steps; in float32.

    Fused attention beside kinks is taken in its plain form instead, which has a second derivative.

    Never by choice where the graph of g has kinks (ReLU, max-pooling, clamps): one difference may
    agree and the next be off by many times ||H q||, as its shift crosses kinks of which autograd's
    second derivative knows nothing.

    Looks come at the 10th evaluation, then at twice the distance up to every 500, and when the
    certificate has tripled since the last (``Alarm``); each costs about seven gradients. After a
    disagreement, or where double backward is as cheap, it stays for good. Where differences must
    serve, a look compares their steps with each other, takes the best and warns if none is steady.
    No looks with 16 bits, under autocast or on several workers.

    ``current`` is the engine in use and ``reason`` says why; changes are logged (INFO).

    Args:
        weighs_costs: use differences also where torch could do without. For a step of the
            penalty method; a linear system solved to a tolerance wants exact products.
    """

    name = "auto"
    falls_back = True
    _PERIOD, _FIRST = 500, 10

    def __init__(self, weighs_costs: bool = False) -> None:
        self._exact = DoubleBackward()
        self._weighs_costs, self._evaluations = weighs_costs, 0
        self.renew()

    def renew(self) -> None:
        self._exact.renew()
        self.current: Curvature = self._exact
        self.reason = "no product has been taken yet"
        self._works = False  # has double backward been through once?
        self._plain_attention = False
        self._looks = True
        self._unsteady = False  # was it said?
        self._gap = self._FIRST
        self._next_look = self._evaluations + self._gap
        self._alarm = Alarm()

    @property
    def takes_differences(self) -> bool:
        """Are finite differences in use?"""
        return isinstance(self.current, FiniteDifference)

    switched = takes_differences

    @property
    def in_use(self) -> Curvature:
        return self.current

    @property
    def product_cost(self) -> int:
        return self.current.product_cost

    def exact(self) -> Automatic:
        copy = Automatic()
        if self.switched and not self._works:
            copy.switch()
        return copy

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        return self.current.gradient(loss, at)

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        self._evaluations += 1
        if self._is_time(at):
            self._gap = min(2 * self._gap, self._PERIOD)
            self._next_look = self._evaluations + self._gap
            self._alarm = self._alarm.reset()
            return (self._compared if self._works else self._rechecked)(loss, at, reusable)
        if self.switched:
            return self.current.linearise(loss, at, reusable=reusable)
        return self._tried(loss, at, reusable)

    def linearise_map(self, phi: Map, at: Pair, *, reusable: bool = False) -> Linearised:
        return self._exact.linearise_map(phi, at, reusable=reusable)  # first derivatives only

    def observe(self, adjoint_residual: float, slope: float) -> None:
        self._alarm = self._alarm.after(adjoint_residual, slope)
        if self.switched and self._alarm.rings:
            self._next_look = self._evaluations

    def switch(self, reason: str | None = None) -> None:
        """Use finite differences from now on."""
        self.current = FiniteDifference()
        self._works = False
        self.reason = reason or "switched by hand or by a checkpoint"
        if reason is not None:
            warn(f"switched to finite differences: {reason}")

    def refute(self, refusal: DoubleBackwardError) -> None:
        self.switch(refusal.reason)

    def packed(self) -> dict[str, Any]:
        return {
            "switched": self.switched,
            "relative_step": getattr(self.current, "relative_step", None),
            "works": self._works,
            "weighs_costs": self._weighs_costs,
            "plain_attention": self._plain_attention,
            "looks": self._looks,
            "unsteady": self._unsteady,
            "evaluations": self._evaluations,
            "next_look": self._next_look,
            "gap": self._gap,
            "alarm": list(self._alarm),
            "reason": self.reason,
        }

    def unpack(self, saved: dict[str, Any]) -> None:
        """Go on where ``packed`` was called, also by a version that looked at fixed distances."""
        self.current = self._exact
        if saved["switched"]:
            self.switch()
            self.current = FiniteDifference(saved["relative_step"])
        self._works, self._weighs_costs = saved["works"], saved["weighs_costs"]
        self._plain_attention = saved.get("plain_attention", False)
        self._looks = saved.get("looks", saved["weighs_costs"])
        self._unsteady = saved.get("unsteady", False)
        self._evaluations, self._next_look = saved["evaluations"], saved["next_look"]
        self._gap = saved.get("gap", self._PERIOD)
        self._alarm = Alarm(*saved.get("alarm", ()))
        self.reason = saved.get("reason", self.reason)

    # Must it?

    def _tried(self, loss: Loss, at: Pair, reusable: bool) -> Linearised:
        """By double backward, or after its refusal by differences.

        Graphs are looked through, and random numbers kept, until it has worked once.
        """
        if self._plain_attention:
            loss = each(with_plain_attention, loss)
        random, unknown, seen = None, loss, Inspection()
        if not self._works:
            random = RandomState(t.device for t in (*at.upper, *at.lower))
            unknown = each(seen.noting, loss)

        def again(reason: DoubleBackwardError) -> Linearised:
            if seen.kink and seen.fused_attention and not self._plain_attention:
                self._plain_attention = True
                engine, repeated = self._exact, each(with_plain_attention, loss)
                warn(
                    "attention is taken in its plain form (sdpa_kernel(SDPBackend.MATH)), as its "
                    f"fused one has no second derivative and {seen.kink} beside it rules "
                    "differences out"
                )
            else:
                self.switch(reason.reason)
                engine, repeated = self.current, loss
            with random.replayed() if random else contextlib.nullcontext():
                return engine.linearise(repeated, at, reusable=reusable)

        try:
            tried = self._exact.linearise(unknown, at, reusable=reusable)
        except DoubleBackwardError as error:
            return again(error)

        current = tried

        def product(direction: Tensors) -> OptionalPair:
            nonlocal current
            try:
                result = current.product(direction)
            except DoubleBackwardError as error:
                # For later products too: a difference has since moved v under the first graph.
                current = again(error)
                return current.product(direction)
            if current is tried and not self._works and not self.switched:
                self._works, self.reason = True, "torch has all second derivatives"
            return result

        return tried._replace(product=product)

    # Looks.

    def _is_time(self, at: Pair) -> bool:
        # Both J q and H q are compared, so not where only v is about to move.
        ready = self._looks and (self._works or self.switched)
        due = self._evaluations >= self._next_look and len(at.upper) > 0
        return ready and due and evidence.is_comparable(at)

    def _compared(self, loss: Loss, at: Pair, reusable: bool) -> Linearised:
        """By double backward; the first product that is not zero is also taken by differences."""
        random = RandomState(t.device for t in (*at.upper, *at.lower))
        seen, before = Inspection(), self.current
        differences = before if isinstance(before, FiniteDifference) else FiniteDifference()
        with evidence.Traffic() as traffic:
            exact = self._tried(each(seen.looking, differences.looking(loss)), at, reusable)
        if isinstance(loss, MeanLoss):  # the product evaluates it anew
            traffic = evidence.Traffic()
        is_open = True

        def product(direction: Tensors) -> OptionalPair:
            nonlocal is_open
            with traffic:
                result = exact.product(direction)
            if is_open and self._works and float(norm(direction)) > 0:
                is_open = False
                if differences.is_coarse:
                    self._looks = False
                    self._use(self._exact, "in 16 bits a difference is noise")
                elif seen.kink is None:
                    self._decide(differences, loss, at, direction, result, traffic.bytes, random)
                else:
                    self._use(self._exact, f"{seen.kink} has kinks, which differences stumble over")
            return result

        return exact._replace(product=product)

    def _decide(
        self,
        differences: FiniteDifference,
        loss: Loss,
        at: Pair,
        direction: Tensors,
        exact: OptionalPair,
        moved: int,
        random: RandomState,
    ) -> None:
        try:
            found = evidence.weigh(differences, loss, at, direction, exact, moved, random)
        except NondeterministicClosureError:
            self._looks = False
            self._use(self._exact, "the lower closure draws other data when called again")
            return
        if found.refutes_double_backward:
            self.switch(
                f"they agree to {found.spread:.1g} among themselves and differ by "
                f"{found.disagreement:.1g} from autograd's second derivative, which does not see "
                "how the gradient depends on v: is it made in a hook or a custom backward, or from "
                "values under no_grad or detach? Also ask optimizer.check_hypergradient(...)"
            )
            self.current = differences
            return
        # With 64 bits accuracy is the point.
        may = self._weighs_costs and all(v.dtype == torch.float32 for v in at.lower)
        self._looks = may and found.favours_differences
        self._use(differences if self._looks else self._exact, str(found))

    def _use(self, engine: Curvature, reason: str) -> None:
        news = type(engine) is not type(self.current)
        self.current, self.reason = engine, reason
        if news:
            _log.info("%s from evaluation %d: %s", engine.name, self._evaluations, reason)

    def _rechecked(self, loss: Loss, at: Pair, reusable: bool) -> Linearised:
        """By differences; the first product that is not zero is also taken with other steps."""
        random = RandomState(t.device for t in (*at.upper, *at.lower))
        differences = self.current
        assert isinstance(differences, FiniteDifference)
        made = differences.linearise(loss, at, reusable=reusable)
        is_open = not differences.is_coarse

        def product(direction: Tensors) -> OptionalPair:
            nonlocal is_open
            result = made.product(direction)
            if is_open and float(norm(direction)) > 0:
                is_open = False
                self._judge(evidence.steadied(differences, loss, at, direction, random))
            return result

        return made._replace(product=product)

    def _judge(self, spread: float) -> None:
        if spread > _STEADY and not self._unsteady:
            self._unsteady = True
            warn(UNSTEADY.format(spread=spread))
