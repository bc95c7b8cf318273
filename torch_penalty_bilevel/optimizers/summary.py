"""What ``repr`` of an optimizer says above torch's list of groups."""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer

from .. import levels
from ..curvature import Curvature
from ..metrics import Metrics


def of_level(rule: Optimizer) -> str:
    """``"2 tensors, 650 numbers, 1 tensor frozen; Adam, lr 0.1"``."""
    tensors = levels.parameters(rule)
    frozen = sum(not p.requires_grad for p in tensors)
    size = f"{_count(len(tensors), 'tensor')}, {_count(sum(p.numel() for p in tensors), 'number')}"
    if frozen:
        size += f", {_count(frozen, 'tensor')} frozen"
    return f"{size}; {' and '.join(_rule(part) for part in levels.parts(rule))}"


def of_engine(engine: Curvature) -> str:
    """Its name and, of one that chooses, what it chose and why."""
    chosen = engine.in_use
    if chosen is engine:
        return engine.name
    return f"{engine.name}, now {chosen.name}: {engine.reason}"


def of_progress(counts: Mapping[str, int], metrics: Metrics) -> str:
    """How far a run is, and the numbers of its last evaluation in one line.

    Args:
        counts: ``"steps"`` and ``"gradient_evaluations"``.
        metrics: of the last evaluation.
    """
    evaluations = counts["gradient_evaluations"]
    done = f"{_count(counts['steps'], 'step')}, {_count(evaluations, 'gradient evaluation')}"
    if metrics.gradient_evaluations == 0:  # just built, or loaded
        return f"{done}; no metrics yet"
    seen = metrics.as_dict()
    return (
        f"{done}; last f {seen['upper_loss']:.4g}, g {seen['lower_loss']:.4g}, "
        f"certificate {seen['adjoint_residual_norm']:.3g} "
        f"({seen['relative_certificate']:.2g} of ||grad_v f||), "
        f"hypergradient {seen['upper_grad_norm']:.3g}"
    )


def _rule(rule: Optimizer) -> str:
    rates = {f"{float(group['lr']):g}": None for group in rule.param_groups if "lr" in group}
    return ", lr ".join([type(rule).__name__, *([" | ".join(rates)] if rates else [])])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
