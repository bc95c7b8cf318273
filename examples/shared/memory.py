"""What torch's allocators held: the CPU's from its own events, a GPU's from its counters."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_on(device: torch.device, run: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once inside ``run``, above what there was before."""
    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def peak_bytes(run: Callable[[], Any]) -> int:
    """``peak_on`` the CPU."""
    return max(accumulate(changes(run), initial=0))


def kept_bytes(run: Callable[[], Any]) -> int:
    """Allocated less freed in ``run``, where frees count of what a traced run had allocated."""
    return sum(changes(run))


def changes(run: Callable[[], Any]) -> list[int]:
    """Bytes allocated (> 0) and freed (< 0), in the order of time."""
    traced = [ProfilerActivity.CPU]
    with profile(activities=traced, profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [
        size
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    ]
