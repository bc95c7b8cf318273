"""A rule's arithmetic in other surroundings than those its step hooks see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer


@contextlib.contextmanager
def around(rule: Optimizer, make: Callable[[], AbstractContextManager[None]]) -> Generator[None]:
    """Inside the block, ``rule.step()`` runs its own arithmetic within ``make()``.

    Its hooks run outside of that: what they read is as ever, and what they change counts.
    """
    depth = 0  # a step that calls the step of its base class has the hooks run for both
    with contextlib.ExitStack() as stack:

        def enter(*_: Any) -> None:
            nonlocal depth
            if depth == 0:
                stack.enter_context(make())
            depth += 1

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                stack.close()

        handles = rule.register_step_pre_hook(enter), rule.register_step_post_hook(leave)
        # The last hook before, so this has to be the first one after.
        hooks: Any = rule._optimizer_step_post_hooks  # an OrderedDict
        hooks.move_to_end(handles[1].id, last=False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
