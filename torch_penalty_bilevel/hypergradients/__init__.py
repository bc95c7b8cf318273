"""Hypergradients by every method, on problems that may be live closures or pure functions."""

from __future__ import annotations

from .estimate import Estimate as Estimate
from .estimate import estimated as estimated
from .estimate import reachable as reachable
from .implicit import usual_step as usual_step
from .options import IMPLICIT as IMPLICIT
from .options import OPTIONS_OF as OPTIONS_OF
from .options import Options as Options
from .options import check_method as check_method
from .options import check_options as check_options
from .problem import Problem as Problem
from .pure import HypergradientInfo as HypergradientInfo
from .pure import pure_hypergradient as pure_hypergradient
from .unrolled import Visit as Visit
