"""Where the host waits for a CUDA device."""

import sys
import warnings
from collections import Counter

import torch


def waits(run):
    """Where in the package the host waited for the device in ``run``, and how often."""
    found = Counter()

    def note(message, *_args, **_options):
        frame, place = sys._getframe(1), ""
        while frame is not None and not place:
            name = frame.f_code.co_filename.partition("torch_penalty_bilevel/")[2]
            place = f"{name}:{frame.f_code.co_name}" if name else ""
            frame = frame.f_back
        if "called a synchronizing" in str(message):
            found[place or str(message)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(found)
