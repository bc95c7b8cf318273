"""Accelerate's gradient accumulation, by the optimizer's micro-batches."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from accelerate import Accelerator
except ImportError as error:
    from .missing import missing

    raise missing("accelerate") from error


class MicroBatches:
    """Collects the closures of an accumulation and steps with all of them at its end.

    ``Accelerator(gradient_accumulation_steps=k)`` leaves out k - 1 of k calls of ``step``, which is
    right for optimizers whose gradients have been accumulated meanwhile. Here nothing is: a step
    that is left out is a batch that is lost. This keeps the closures, and at the k-th call (or at
    the end of the loader) takes the step of f = mean of the f's, g = mean of the g's::

        accelerator = Accelerator(gradient_accumulation_steps=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        micro_batches = MicroBatches(accelerator, optimizer)
        for x, y in loader:
            with accelerator.accumulate(model):
                micro_batches.step(lambda x=x: f(model, x), lambda x=x, y=y: g(model, x, y))

    What waits is not part of ``accelerator.save_state``: save after a step.

    Args:
        accelerator: whose ``accumulate`` the loop uses.
        optimizer: as ``prepare`` returned it.
    """

    def __init__(self, accelerator: Accelerator, optimizer: Any) -> None:
        self.accelerator, self.optimizer = accelerator, optimizer
        self._waiting: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = []
        self._held: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def step(
        self, upper_closure: Callable[[], Tensor], lower_closure: Callable[[], Tensor]
    ) -> Tensor | None:
        """Step where Accelerate would; f, 0-d, averaged over the micro-batches, or None.

        Args:
            upper_closure: of this micro-batch, which it keeps (``lambda x=x: ...``).
            lower_closure: likewise.

        Raises:
            ValueError: a lower closure reads the same variables as the one before, or a variable
                that an upper one reads has changed since, so that it would see the batch of the
                last one by the time it is called. Nothing waits then.
        """
        if any(_reads(lower_closure) == _reads(before) for _, before in self._waiting):
            raise ValueError(
                f"lower_closure of micro-batch {len(self)} reads the variables of an earlier one, "
                "so that all would see the last batch; bind it: lambda batch=batch: ..."
            )
        self._waiting.append((upper_closure, lower_closure))
        self._held.append(_variables(upper_closure))
        if not self.accelerator.sync_gradients:
            return None
        uppers, lowers = (list(closures) for closures in zip(*self._waiting, strict=True))
        held = self._held.copy()
        self._waiting.clear()
        self._held.clear()
        for number, (upper, before) in enumerate(zip(uppers, held, strict=True)):
            now = _variables(upper)  # as before, where one f serves all: the whole trusted set
            if any(now.get(name) is not value for name, value in before.items()):
                raise ValueError(
                    f"a variable that upper_closure of micro-batch {number} reads has changed "
                    "since, so that it would see a later batch; bind it: lambda batch=batch: ..."
                )
        # AcceleratedOptimizer.step returns nothing.
        self.optimizer.step((uppers, lowers))
        return getattr(self.optimizer, "optimizer", self.optimizer).metrics.upper_loss


def _variables(closure: Any) -> dict[str, Any]:
    """What the enclosing and global variables that a function reads hold now."""
    if isinstance(closure, functools.partial):
        return _variables(closure.func)
    function = getattr(closure, "__func__", closure)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    read = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    around = inspect.getclosurevars(function)  # whose globals are those of attributes' names too
    return {name: v for name, v in around.globals.items() if name in read} | {**around.nonlocals}


def _reads(closure: Any) -> tuple[Any, ...]:
    """What a function is made of, by identity: its code, and where its variables are."""
    if isinstance(closure, functools.partial):
        bound = (*closure.args, *closure.keywords.values())
        return (*_reads(closure.func), *map(id, bound))
    function = getattr(closure, "__func__", closure)
    parts = (getattr(closure, "__self__", None), getattr(function, "__code__", function))
    cells = getattr(function, "__closure__", None) or ()
    defaults = (
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    )
    return tuple(map(id, (*parts, *cells, *defaults)))
