"""What an optimizer of two levels remembers beside its rules: put back by a failed step, saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeAlias

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import levels
from ..checks.suspicions import DependenceWatch, raise_unused
from ..curvature import Curvature
from ..evaluation import Evaluation
from ..levels import checkpoint, rules
from ..penalties import Losses, Reduce
from ..undo.buffers import BufferGuard
from ..undo.transaction import all_or_nothing
from ..workers import Workers, resolve
from .two_level import Here, TwoLevelOptimizer

OptimizerPreHook: TypeAlias = Callable[[Any, Any, Any], Any]


class TwoLevelMemory(TwoLevelOptimizer):
    """Both rules, an engine, and a memory of which subclasses say what it is."""

    curvature: Curvature
    allow_unused: bool
    _dependence: DependenceWatch
    _workers: Workers

    @property
    def reduce(self) -> Reduce:
        """The average over workers."""
        return self._workers.mean

    @reduce.setter
    def reduce(self, mean: Literal["mean"] | Reduce | None) -> None:
        self._workers = Workers(resolve(mean, None))

    def register_step_pre_hook(self, hook: OptimizerPreHook) -> RemovableHandle:
        """As of any optimizer; what it raises on one worker ends the step on all of them."""

        def held(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            return self._workers.before_step(lambda: hook(optimizer, args, kwargs))

        return super().register_step_pre_hook(held)

    def _shared(self, engine: Curvature) -> tuple[Curvature, Reduce]:
        """``engine`` and the average, so that workers fail together."""
        return self._workers.engine(engine), self._workers.reduce

    def _look(self, losses: Losses, here: Here) -> Losses:
        """Does everything here depend on what it should, where that is to be asked?"""
        how = self._scope, self.allow_unused, self._lower_is_map(), self.curvature, self._workers
        return self._dependence.look(losses, here.at, here.upper_names, here.lower_names, *how)

    def _check_used(
        self,
        losses: Losses,
        here: Here,
        evaluation: Evaluation,
        direct_only: bool = False,
    ) -> list[str]:
        """Names of the upper parameters without a gradient; raises unless that is allowed."""
        pairs = zip(here.upper_names, evaluation.upper_grad, strict=True)
        unused = [name for name, gradient in pairs if gradient is None]
        if unused and not self.allow_unused:
            self._dependence.due = True  # is it the lower level that nothing depends on?
            self._look(losses, here._replace(lower_names=[]))
            raise_unused(unused, direct_only=direct_only)
        return unused

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Torch's ``{"state", "param_groups"}``; tensors are not copied.

        What is remembered for each lower parameter is in its entry of ``state``, the rest in the
        first lower group, so ``torch.distributed.checkpoint`` and what it flattens keep all of it.
        """
        count, complete = len(levels.parameters(self.lower)), self._is_complete
        _, rest = checkpoint.spread(self._own_state(), self._lists(), count)
        group = self.lower.param_groups[0]
        group[checkpoint.GROUP], self._is_complete = rest, True
        try:
            return super().state_dict()
        finally:
            group[checkpoint.GROUP], self._is_complete = {}, complete

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken: the next step is bit-equal.

        Checkpoints of the earlier format, with an entry ``"bilevel"`` beside the others, load too.

        Raises:
            ValueError: the checkpoint does not fit; nothing was changed.
        """
        own = self._gathered(state_dict)
        for group, here in zip(state_dict["param_groups"], self.param_groups, strict=True):
            rule = levels.owner(self._rules()[group["level"]], here)
            rules.check_group(rule, group, group["level"], self._lower_is_map())
        checkpoint.check_options(state_dict["param_groups"], self.param_groups)
        checkpoint.check_shapes(state_dict, self.param_groups)
        self._check_own_state(own)
        groups = [
            {k: v for k, v in group.items() if k != checkpoint.GROUP}
            for group in state_dict["param_groups"]
        ]
        state = checkpoint.without(state_dict["state"])
        super().load_state_dict({"state": state, "param_groups": groups})
        self._load_own_state(own)
        self._is_complete = True

    def _gathered(self, state_dict: dict[str, Any]) -> checkpoint.Memory:
        groups = [g for g in state_dict["param_groups"] if g.get("level") == "lower"]
        old = state_dict.get("bilevel")
        rest = old or next((g[checkpoint.GROUP] for g in groups if g.get(checkpoint.GROUP)), None)
        if rest is None:
            raise ValueError(
                f"not a state dict of {type(self).__name__}: it has no 'bilevel' entry (a state "
                "dict of one level? load it into optimizer.upper or optimizer.lower)"
            )
        saved = [group.get("level") for group in state_dict["param_groups"]]
        here = [group["level"] for group in self.param_groups]
        if saved != here:
            raise ValueError(
                f"the checkpoint's groups have levels {saved}, this optimizer's have {here}"
            )
        if old:
            return old
        lower = levels.parameters(self.lower)
        own, _ = checkpoint.spread(self._own_state(), self._lists(), len(lower))
        keys = [key for group in groups for key in group["params"]]
        if len(keys) != len(lower):
            raise ValueError(
                f"the checkpoint has {len(keys)} lower parameters, this optimizer {len(lower)}"
            )
        entries = [
            state_dict["state"].get(key, None if not p.requires_grad else {})
            for key, p in zip(keys, lower, strict=True)
        ]
        return checkpoint.gathered(entries, rest, own)

    # What both kinds remember.

    def _remembered(self) -> Any:
        """All that a step changes in this object, as one; ``_put_back`` takes it."""
        raise NotImplementedError

    def _put_back(self, remembered: Any) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _undone(self, rules: Sequence[Optimizer]) -> Generator[BufferGuard]:
        """Undo everything if the block raises; ``rules`` may step before its last evaluation."""
        remembered, engine = self._remembered(), self.curvature.packed()
        try:
            undone = all_or_nothing(rules, self._devices(), self._scope)
            with undone as guard, self._workers.agreeing(self.curvature):
                self._workers.meet(levels.parameters(self.lower)[0])
                yield guard
        except BaseException as error:
            if self._workers.is_shared:  # where it failed it was not looked at
                self._dependence.due = True
            self._put_back(remembered)
            self.curvature.unpack(engine)
            if isinstance(error, (RuntimeError, TypeError)):
                self._explain_changed(error)
            raise
        self._opt_called = True  # schedulers warn unless step() was called; half a one will do

    def _engine_packed(self) -> dict[str, Any]:
        packed = self.curvature.packed()
        return packed | {"name": self.curvature.name} if packed else {}

    def _unpack_engine(self, saved: dict[str, Any]) -> None:
        """An engine of another kind goes its own way; the earlier format kept one kind's alone."""
        if saved and saved.get("name", "auto") == self.curvature.name:
            self.curvature.unpack({k: v for k, v in saved.items() if k != "name"})

    def _check_own_state(self, own: dict[str, Any]) -> None:
        raise NotImplementedError

    def _load_own_state(self, own: dict[str, Any]) -> None:
        raise NotImplementedError
