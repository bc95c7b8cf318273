"""Deterministic bilevel problems, solved to the end: a trust-region Newton method."""

from __future__ import annotations

from .minimize import minimize as minimize
from .result import MinimizeResult as MinimizeResult
