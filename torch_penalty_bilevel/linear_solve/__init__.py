"""Linear solvers that know a matrix by its products, on tuples of tensors.

All return the last iterate with its true residual; a breakdown is NaN, and ``status`` names it.
"""

from __future__ import annotations

from .conjugate_gradient import conjugate_gradient as conjugate_gradient
from .conjugate_gradient import least_squares as least_squares
from .semidefinite import conjugate_residual as conjugate_residual
from .solution import NOT_FINITE as NOT_FINITE
from .solution import Product as Product
from .solution import Solution as Solution
from .solution import Status as Status
from .solution import broken as broken
from .spectrum import lanczos_lowest as lanczos_lowest
from .spectrum import largest_stretch as largest_stretch
from .spectrum import random_direction as random_direction
from .stationary import fixed_point as fixed_point
from .stationary import neumann as neumann
from .stochastic import MakeOptimizer as MakeOptimizer
from .stochastic import stochastic as stochastic
