"""Hypergradients by every method, on problems that may be live closures or pure functions."""

from __future__ import annotations

from .estimate import Estimate as Estimate
from .estimate import estimated as estimated
from .implicit import solve_adjoint as solve_adjoint
from .lower_steps import learning_rates as learning_rates
from .lower_steps import restart as restart
from .lower_steps import take_lower_steps as take_lower_steps
from .options import IMPLICIT as IMPLICIT
from .options import OPTIONS_OF as OPTIONS_OF
from .options import Count as Count
from .options import MethodOptions as MethodOptions
from .options import check_loop as check_loop
from .options import check_method as check_method
from .options import check_options as check_options
from .options import check_products as check_products
from .options import count_at as count_at
from .problem import Linear as Linear
from .problem import LocalProblem as LocalProblem
from .problem import Upper as Upper
from .problem import check_serves_maps as check_serves_maps
from .pure import HypergradientInfo as HypergradientInfo
from .pure import pure_hypergradient as pure_hypergradient
from .unrolled import Visit as Visit
