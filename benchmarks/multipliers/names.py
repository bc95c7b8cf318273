"""The rows of the tables. A new rule needs a line here, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.multipliers import rules, tried_rules
from benchmarks.multipliers.exact import Exact
from torch_penalty_bilevel import EpsilonTest, LeastSquares
from torch_penalty_bilevel.multipliers import MultiplierRule

RULES: dict[str, Callable[[], MultiplierRule]] = {
    "exact": Exact,
    "default": LeastSquares,
    "energy": rules.Energy,
    "residual": rules.Residual,
    "no correction": lambda: LeastSquares(subspace=False),
    "share=0": lambda: LeastSquares(share=0.0),
    "heavy_ball": rules.HeavyBall,
    "nesterov": rules.Nesterov,
    "bb_long": rules.BarzilaiBorwein,
    "bb_short": rules.ShortBarzilaiBorwein,
    "anderson": rules.Anderson,
    "cg": rules.ConjugateGradients,
    "adam": rules.ScaledByAdam,
    "cg_on_v": rules.ConjugateLower,
    "primal_dual": rules.PrimalDual,
    "paper": lambda: EpsilonTest(weight=1.0, damping=10.0, tolerance=1.0),
    **tried_rules.TRIED,
}
WHOLE_STEPS = {"cg_on_v"}
"""Rules whose lower direction is the whole step of v, so that v is moved by SGD at rate 1."""
