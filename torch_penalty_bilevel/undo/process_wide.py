"""Settings of the whole process, made for a while by several threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


class ProcessWide:
    """The first thread in makes the setting, the last one out puts back what was found.

    torch's own blocks (``set_stance``, ``sdpa_kernel``) each put back what they found: of two
    threads that overlap, the second would leave the first one's setting for good.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        """Take ``make``, which returns a fresh block with the setting."""
        self._make, self._lock, self._inside = make, threading.Lock(), 0
        self._found = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._found.enter_context(self._make())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._found.close()
