"""Bilevel optimisation in PyTorch by penalty: min over u of f(u, v) where v minimises g(u, .)."""

from __future__ import annotations

from . import constraints as constraints
from . import functional as functional
from . import nn as nn
from .checks.report import HypergradientReport as HypergradientReport
from .curvature import DoubleBackward as DoubleBackward
from .curvature import FiniteDifference as FiniteDifference
from .errors import AdjointError as AdjointError
from .errors import BilevelError as BilevelError
from .errors import BilevelWarning as BilevelWarning
from .errors import DoubleBackwardError as DoubleBackwardError
from .errors import NondeterministicClosureError as NondeterministicClosureError
from .errors import NonFiniteError as NonFiniteError
from .errors import UnusedParameterError as UnusedParameterError
from .errors import WorkerError as WorkerError
from .metrics import Metrics as Metrics
from .multipliers import EpsilonTest as EpsilonTest
from .multipliers import LeastSquares as LeastSquares
from .newton import MinimizeResult as MinimizeResult
from .newton import minimize as minimize
from .optimizers.hypergradient import HypergradientOptimizer as HypergradientOptimizer
from .optimizers.penalty import PenaltyBilevelOptimizer as PenaltyBilevelOptimizer
from .penalties import FixedPoint as FixedPoint
from .penalties import Stationarity as Stationarity
from .penalties import ValueGap as ValueGap

__version__ = "0.1.0"

__all__ = [
    "AdjointError",
    "BilevelError",
    "BilevelWarning",
    "DoubleBackward",
    "DoubleBackwardError",
    "EpsilonTest",
    "FiniteDifference",
    "FixedPoint",
    "HypergradientOptimizer",
    "HypergradientReport",
    "LeastSquares",
    "Metrics",
    "MinimizeResult",
    "NonFiniteError",
    "NondeterministicClosureError",
    "PenaltyBilevelOptimizer",
    "Stationarity",
    "UnusedParameterError",
    "ValueGap",
    "WorkerError",
    "constraints",
    "functional",
    "minimize",
    "nn",
]
