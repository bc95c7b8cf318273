"""What is measured of a step: time against other steps, FLOPs, saved activations, peak memory."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from examples.shared.memory import changes, peak_bytes

Step = Callable[[], object]
# The penalty's curvature probe: one more product in every so many steps.
PERIOD = 20
# The CPU's flash attention is missing from torch's table.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda *shapes, **_: sdpa_flop_count(*shapes[:3])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}


def race(
    benchmark: Any, step: Step, references: Mapping[str, Step], seconds: float, warmup: int
) -> None:
    """Time ``step`` with each reference run just before it; keep the medians of the ratios.

    Neighbours in time share whatever else the machine is doing, so their ratio is steadier than
    either time. What is short runs once untimed first, or it would find the other's data in the
    caches. Written to ``benchmark.extra_info``: ``ratios`` (quartiles), ``reference_seconds``.
    """
    taken: dict[str, list[float]] = {name: [] for name in references}

    def before() -> None:
        for name, reference in references.items():
            if is_short:
                reference()
            taken[name].append(seconds_of(reference))
        if is_short:
            step()

    for _ in range(warmup):
        for reference in references.values():
            reference()
        step()
    each = seconds_of(step) + sum(seconds_of(reference) for reference in references.values())
    is_short = each < 0.02
    rounds = round(min(max(seconds / each / (1 + is_short), 3), 200))
    benchmark.pedantic(step, setup=before, rounds=rounds)
    own = benchmark.stats.stats.data
    benchmark.extra_info["ratios"] = {
        name: statistics.quantiles([a / b for a, b in zip(own, times, strict=True)], n=4)
        for name, times in taken.items()
    }
    benchmark.extra_info["reference_seconds"] = {
        name: statistics.median(times) for name, times in taken.items()
    }


def seconds_of(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def flops(step: Step, steps: int = 1) -> float:
    """Per step, from torch's table (matrix products and convolutions; elementwise is free).

    Without oneDNN, whose fused LSTM the table does not know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        off = torch.backends.mkldnn.flags(enabled=False)
        with off, FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            for _ in range(steps):
                step()
    return counter.get_total_flops() / steps


def saved_bytes(step: Step, besides: Iterable[Tensor]) -> int:
    """The most that graphs held at once for their backward, ``besides`` (parameters, data)."""
    ledger = _Ledger(besides)
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda kept: kept.tensor):
        step()
    return ledger.peak


class _Ledger:
    """Live storages held by graphs, each counted once."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self.holders: dict[int, int] = {}
        self.besides = {t.untyped_storage().data_ptr() for t in besides}
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self.besides:
            return
        before = self.holders.get(place, 0)
        self.holders[place] = before + change
        if 0 in (before, before + change):
            self.live += change * storage.nbytes()
            self.peak = max(self.peak, self.live)


class _Kept:
    """Stands for one saved tensor for as long as its graph lives."""

    def __init__(self, ledger: _Ledger, tensor: Tensor) -> None:
        self.ledger, self.tensor = ledger, tensor
        ledger.count(tensor, 1)

    def __del__(self) -> None:
        self.ledger.count(self.tensor, -1)


def peaks_of(build: Callable[[], Step], first: int = 1) -> dict[str, int]:
    """Peaks of all tensors, the problem's own among them: in the ``first`` steps, and in two more.

    The first step looks at more than the later ones, and has no moments yet.
    """
    made: list[Step] = []

    def begin() -> None:
        made.append(build())
        for _ in range(first):
            made[0]()

    until = changes(begin)
    later = sum(until) + peak_bytes(lambda: [made[0]() for _ in range(2)])
    return {"first_peak_bytes": max(accumulate(until)), "peak_bytes": later}
