"""Small arithmetic of the rules' scales."""

from __future__ import annotations


def average(old: float, new: float, memory: float) -> float:
    """A mean that forgets: ``memory`` is the share of the old one."""
    return memory * old + (1 - memory) * new


def ratio(numerator: float, denominator: float) -> float:
    """Numerator / denominator, and 0 where the denominator is 0."""
    return numerator / denominator if denominator > 0 else 0.0
