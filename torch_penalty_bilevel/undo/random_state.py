"""The state of every random number generator a closure may draw from."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Generator, Iterable
from typing import Any

import torch


class RandomState:
    """Torch (CPU and the given devices), Python and NumPy generators, captured at construction.

    Args:
        devices: devices whose generators matter, usually those of the parameters.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }
        # A closure can only have drawn from NumPy if someone imported this, which NumPy does not
        # do by itself; asking for the state takes as long as a small network's forward pass.
        numpy_random: Any = sys.modules.get("numpy.random")
        self._numpy = None if numpy_random is None else numpy_random.get_state()

    def restore(self) -> None:
        """Put every generator back to where it was."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)

    @contextlib.contextmanager
    def replayed(self) -> Generator[None]:
        """Draw the captured numbers again inside the block, then go on as if nothing was drawn."""
        now = RandomState(self._accelerators)
        self.restore()
        try:
            yield
        finally:
            now.restore()
