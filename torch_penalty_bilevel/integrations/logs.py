"""The numbers of a step, into whatever a run is logged with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from ..metrics import Metrics

_METHODS = ("log_dict", "log", "log_metrics")
"""Lightning's modules, Fabric; runs of Weights & Biases, Accelerate, Trainer; Lightning's loggers,
MLflow. The first that takes a dict alone: MLflow's ``log_dict`` writes a file, Trainer's
``log_metrics`` takes a split.
"""


def log_metrics(
    metrics: Metrics, logger: Any, step: int | None = None, prefix: str = "bilevel/"
) -> dict[str, float]:
    """Write what the last step saw, under the names of ``Metrics``; returns what was written.

    What is not finite is left out: ``upper_grad_norm`` after a mere ``lower_step``, all but the
    count before the first step. Reads the numbers, so it waits for the device.

    Args:
        metrics: ``optimizer.metrics``.
        logger: TensorBoard's ``SummaryWriter``; a run of Weights & Biases; a Lightning module (in
            its ``training_step``) or logger, or ``Fabric``; an ``Accelerator``; the module
            ``mlflow``; or a function that takes a dict, and ``step=`` where one is given:
            ``print``, ``trainer.log`` or ``functools.partial(self.log_dict, prog_bar=True)``.
        step: where the numbers stand on the axis. TensorBoard needs it; a Lightning module counts
            by itself; the others count their calls without.
        prefix: of every name.

    Raises:
        TypeError: ``metrics`` are no ``Metrics``, or ``logger`` is none of these.
        ValueError: TensorBoard without a step, or a Lightning module with one.

    Example:
        >>> log_metrics(Metrics.unknown(), print)
        {'bilevel/gradient_evaluations': 0.0}
        {'bilevel/gradient_evaluations': 0.0}
    """
    given: Any = metrics
    if not isinstance(given, Metrics):
        raise TypeError(
            f"metrics must be optimizer.metrics, got {type(given).__name__}; other numbers go to "
            "the logger itself"
        )
    numbers = {
        f"{prefix}{name}": number
        for name, number in metrics.as_dict().items()
        if math.isfinite(number)
    }
    write = _writer(logger, step)
    write(numbers) if step is None else write(numbers, step=step)
    return numbers


def _writer(logger: Any, step: int | None) -> Callable[..., Any]:
    """Which takes (numbers) or (numbers, step=)."""
    if hasattr(logger, "add_scalar"):
        if step is None:
            raise ValueError(
                "step is None, and TensorBoard would put all points at 0; give step=..., e.g. the "
                "number of the batch"
            )
        return _scalars(logger)
    methods = ((name, getattr(logger, name, None)) for name in _METHODS)
    for name, method in methods:
        if callable(method) and _takes(method):
            if name == "log_dict" and step is not None and not _takes(method, step=step):
                raise ValueError(
                    f"step is {step}, but a Lightning module counts by itself; leave it out"
                )
            return method
    if callable(logger) and not isinstance(logger, (Module, type)):
        return logger
    raise TypeError(
        f"logger is {type(logger).__name__}; give a SummaryWriter, a run of Weights & Biases, a "
        "Lightning module or logger, or a function that takes a dict (and step=)"
    )


def _takes(method: Callable[..., Any], **named: int) -> bool:
    """Whether it can be called with a dict, and with ``named``."""
    try:
        inspect.signature(method).bind({}, **named)
    except TypeError:
        return False
    except ValueError:  # written in another language, which does not say
        return True
    return True


def _scalars(writer: Any) -> Callable[..., None]:
    def write(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return write
