"""Steps that a trainer leaves out, with their batches, and does not say so."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import warn


def warn_of_left_out(upper: Any, lower: Any) -> bool:
    """Warn if ``step((f, g))`` came from an Accelerate that accumulates; did it?

    Its wrapper passes on one call of k, because elsewhere gradients would be complete then.
    Sequences of micro-batches are taken for an answer to that.
    """
    state: Any = sys.modules.get("accelerate.state")
    is_sequence = isinstance(upper, (list, tuple)) or isinstance(lower, (list, tuple))
    count = 1 if state is None or is_sequence else state.GradientState().num_steps
    if count == 1:
        return False
    warn(
        f"Accelerate has gradient_accumulation_steps={count} and passes on one step of {count}: "
        "the batches of the others are lost. Give them together, by "
        "torch_penalty_bilevel.integrations.accelerate.MicroBatches(accelerator, optimizer)"
        ".step(f, g), or set gradient_accumulation_steps=1"
    )
    return True
