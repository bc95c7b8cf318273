"""A formulation of one's own: g + kappa ||v||^2 / 2 in the place of g, closures untouched.

    python -m examples.extending.penalty

A penalty says what is evaluated at one point: the residual r, the adjoint q that its rule asks for,
the certificate a = grad_v f + (dr/dv)' q and the estimate grad_u f + (dr/du)' q. Whatever has a
residual and a product with its Jacobian gets the rest from ``evaluate_residual``.
"""

from __future__ import annotations

import torch

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer
from torch_penalty_bilevel.curvature import Curvature
from torch_penalty_bilevel.evaluation import Evaluation
from torch_penalty_bilevel.penalties import Losses, Reduce, evaluate_residual
from torch_penalty_bilevel.tensors import OptionalPair, Pair, Tensors, axpy, filled


class Regularised:
    """r = grad_v g + kappa v, dr/dv = H + kappa I, dr/du = J'."""

    name = "regularised"
    lower_is_map = False
    takes_lower_constraints = False

    def __init__(self, kappa: float) -> None:
        self.kappa, self.rule = kappa, LeastSquares()

    def evaluate(
        self, losses: Losses, at: Pair, state: object, curvature: Curvature, reduce: Reduce
    ) -> Evaluation:
        upper = curvature.gradient(losses.upper, at)
        plain = curvature.linearise(losses.lower, at, reusable=self.rule.probes(state))
        v = tuple(t.detach() for t in at.lower)

        def product(direction: Tensors) -> OptionalPair:
            of_g = plain.product(direction)
            lower = axpy(self.kappa, direction, filled(of_g.lower, at.lower))
            return OptionalPair(of_g.upper, lower)

        regularised = plain._replace(residual=axpy(self.kappa, v, plain.residual), product=product)
        cost = curvature.product_cost
        return evaluate_residual(self.rule, state, at, upper, regularised, cost, reduce)


def main() -> None:
    u, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    b = torch.tensor([1.0, -2.0])
    optimizer = PenaltyBilevelOptimizer(
        [u], [v], penalty=Regularised(1.0), upper_lr=0.02, lower_lr=0.1
    )
    for _ in range(1000):  # v = u / 2, so u = 2 b
        optimizer.step(lambda: (v - b).square().sum(), lambda: (v - u).square().sum() / 2)
    print(f"u = {u.tolist()}, should be {(2 * b).tolist()}")


if __name__ == "__main__":
    main()
