"""What torch's CPU allocator held, from its own events."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at once inside ``run``, above what there was before."""
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
