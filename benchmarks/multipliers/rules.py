"""The multiplier rules that ``python -m benchmarks.multipliers`` compares with the default.

Letters: r = grad_v g the residual, nu the multiplier, H = d2g/dv2, a = grad_v f + H nu. With the
guard against negative curvature mu, e = a + mu nu is the gradient that the default descends with
the step 1 / bound, bound = L + mu; all rules but the last three change only that step. They
remember on ``self``: enough for an experiment, not for checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_penalty_bilevel import LeastSquares
from torch_penalty_bilevel.evaluation import Evaluation, Norms
from torch_penalty_bilevel.multipliers import DualState, MultiplierRule
from torch_penalty_bilevel.multipliers.least_squares_state import LeastSquaresState
from torch_penalty_bilevel.tensors import Tensors, axpy


def flat(tensors: Tensors) -> Tensor:
    """All numbers as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def shaped(vector: Tensor, like: Tensors) -> Tensors:
    """``vector`` cut into the shapes of ``like``."""
    parts = vector.split([t.numel() for t in like])
    return tuple(part.reshape(t.shape) for part, t in zip(parts, like, strict=True))


class Energy(LeastSquares):
    """The default with its correction by least energy alone, as conjugate gradients."""

    def _reach(self, norms: Norms) -> float:
        return 1.0


class Residual(LeastSquares):
    """The same by least residual alone, blind to what H does not reach."""

    def _reach(self, norms: Norms) -> float:
        return 0.0


class Stepped(LeastSquares):
    """The default with another step of nu; the way of v, L, the guard and the watch stay."""

    def __init__(self) -> None:
        super().__init__(subspace=False)

    def forget(self) -> None:
        """Nu starts again at zero."""

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        """The next nu."""
        raise NotImplementedError

    def start(self, lower: Tensors) -> LeastSquaresState:
        self.forget()
        return super().start(lower)

    def lower_update(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, LeastSquaresState]:
        direction, after = super().lower_update(state, evaluation, norms)
        if after.watch.restarts > state.watch.restarts:
            self.forget()
            return direction, after
        shift = self.shift(after) + 2.0 * after.indefinite
        bound = after.curvature + shift
        if bound == 0:
            return direction, after
        nu = flat(state.multiplier)
        e = flat(evaluation.adjoint_residual) + shift * nu
        multiplier = shaped(self.moved(nu, e, bound, evaluation), state.multiplier)
        return direction, after.but(multiplier=multiplier)


class HeavyBall(Stepped):
    """Polyak's momentum 0.9."""

    def forget(self) -> None:
        self.velocity: Tensor | float = 0.0

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        self.velocity = 0.9 * self.velocity - e / bound
        return nu + self.velocity


class Nesterov(Stepped):
    """Momentum t / (t + 3), which starts anew whenever it points uphill."""

    def forget(self) -> None:
        self.point: Tensor | None = None
        self.count = 0

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        point = nu - e / bound
        move = point - (nu if self.point is None else self.point)
        self.count = 0 if float(e @ move) > 0 else self.count + 1
        self.point = point
        return point + self.count / (self.count + 3) * move


class BarzilaiBorwein(Stepped):
    """The step s's / s'y, s and y the last changes of nu and e, between 1/L and ``longest``/L."""

    longest = 100.0

    def forget(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def length(self, s: Tensor, y: Tensor) -> float:
        """The step before its bounds; 0 without curvature."""
        slope = float(s @ y)
        return float(s @ s) / slope if slope > 0 else 0.0

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        size = 0.0
        if self.last is not None:
            size = self.length(nu - self.last[0], e - self.last[1])
        self.last = nu, e
        return nu - min(max(size, 1 / bound), self.longest / bound) * e


class ShortBarzilaiBorwein(BarzilaiBorwein):
    """The step s'y / y'y."""

    def length(self, s: Tensor, y: Tensor) -> float:
        square = float(y @ y)
        return float(s @ y) / square if square > 0 else 0.0


class Anderson(Stepped):
    """The last 5 changes mixed so that the predicted e is least: GMRES on a moving equation."""

    depth = 5

    def forget(self) -> None:
        self.history: list[tuple[Tensor, Tensor]] = []

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        self.history = [*self.history[-self.depth :], (nu, e)]
        if len(self.history) == 1:
            return nu - e / bound
        points, slopes = (torch.stack(column, 1) for column in zip(*self.history, strict=True))
        S, Y = points.diff(dim=1), slopes.diff(dim=1)
        weights = torch.linalg.pinv(Y, rtol=1e-6) @ e
        return nu - S @ weights - (e - Y @ weights) / bound


class ScaledByAdam(Stepped):
    """Adam's direction of e, as long as the default's step."""

    def forget(self) -> None:
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.count = 0

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * e
        self.second = 0.999 * self.second + 0.001 * e.square()
        direction = self.first / (1 - 0.9**self.count)
        direction = direction / ((self.second / (1 - 0.999**self.count)).sqrt() + 1e-30)
        length = float(direction.norm())
        return nu - float(e.norm()) / (bound * length) * direction if length > 0 else nu


class ConjugateGradients(Stepped):
    """Conjugate directions with exact steps (of H alone), for one more product per lower step."""

    def forget(self) -> None:
        self.direction: Tensor | None = None

    def probes(self, state: LeastSquaresState) -> bool:
        return True

    def probe(self, state: LeastSquaresState, residual: Tensors, slope: Tensors) -> Tensors:
        if self.direction is None:
            self.direction = -flat(slope)
        size = float(self.direction.norm())
        if not size > 0:  # nothing to solve: any direction serves L
            self.direction = flat(residual)
            size = float(self.direction.norm()) or 1.0
        self.direction = self.direction / size
        return shaped(self.direction, residual)

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        p, product = self.direction, flat(evaluation.probe_product)
        assert p is not None
        curvature = float(p @ product)
        if not curvature > 1e-14 * bound:
            self.direction = -e
            return nu - e / bound
        step = -float(e @ p) / curvature
        after = e + step * product
        self.direction = -after + float(after @ product) / curvature * p
        return nu + step * p


class ConjugateLower(LeastSquares):
    """v by conjugate directions with exact steps (its rule is SGD at 1); nu as by default."""

    def start(self, lower: Tensors) -> LeastSquaresState:
        self.direction: Tensor | None = None
        return super().start(lower)

    def probes(self, state: LeastSquaresState) -> bool:
        return True

    def probe(self, state: LeastSquaresState, residual: Tensors, slope: Tensors) -> Tensors:
        if self.direction is None:
            self.direction = -flat(residual)
        self.direction = self.direction / (float(self.direction.norm()) or 1.0)
        return shaped(self.direction, residual)

    def lower_update(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, LeastSquaresState]:
        gradient, after = super().lower_update(state, evaluation, norms)
        d, p, product = flat(gradient), self.direction, flat(evaluation.probe_product)
        assert p is not None
        bound, curvature = after.curvature, float(p @ product)
        if not curvature > 1e-6 * bound:
            self.direction = None
            move = -d / bound if bound > 0 else -d
            return shaped(-move, gradient), after
        step = -float(d @ p) / curvature
        left = d + step * product
        self.direction = -left + float(left @ product) / curvature * p
        return shaped(-step * p, gradient), after


class PrimalDual(MultiplierRule):
    """Ascent nu += sigma r on the augmented Lagrangian f + <nu, r> + gamma ||r||^2 / 2."""

    shares_evaluation = True

    def __init__(self, weight: float = 1.0, sigma: float = 0.1) -> None:
        self.weight, self.sigma = weight, sigma

    def start(self, lower: Tensors) -> DualState:
        return DualState.at(lower, weight=self.weight, damping=1.0)

    def adjoint(self, state: DualState, residual: Tensors) -> Tensors:
        return axpy(self.weight, residual, state.multiplier)

    def lower_update(
        self, state: DualState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, DualState]:
        direction = axpy(1.0, evaluation.residual, evaluation.adjoint_residual)
        multiplier = axpy(self.sigma, evaluation.residual, state.multiplier)
        return direction, state.but(multiplier=multiplier, steps=state.steps + 1)
