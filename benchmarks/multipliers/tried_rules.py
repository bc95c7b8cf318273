"""Corrections of the multiplier other than the default's, which were tried and are not better.

All are judged as the default's is (``multipliers/subspace.py``): before each evaluation the part of
a in the span of some past directions is forecast as if the system stood still, and what is added to
the plain step is multiplied by the gain max(0, 1 - N / D). Letters as in ``rules.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.multipliers.rules import Stepped, flat
from torch_penalty_bilevel.evaluation import Evaluation
from torch_penalty_bilevel.multipliers import MultiplierRule
from torch_penalty_bilevel.multipliers.least_squares_state import LeastSquaresState
from torch_penalty_bilevel.tensors import Tensors


class Gain:
    """1 - N / D from forecasts of V'e."""

    def __init__(self) -> None:
        self.missed = self.at_stake = 0.3
        self.value = 0.0
        self.forecast: tuple[Tensor, Tensor, Tensor, float] | None = None

    def judge(self, e: Tensor) -> None:
        """The forecast for this evaluation."""
        if self.forecast is None:
            return
        directions, expected, before, square = self.forecast
        self.forecast = None
        unit = square + float(e @ e)
        if not unit > 0:
            return
        error = float((directions.T @ e - expected).square().sum())
        self.missed = 0.9 * self.missed + 0.1 * error / unit
        self.at_stake = 0.9 * self.at_stake + 0.1 * float(before.square().sum()) / unit
        self.value = max(0.0, 1.0 - self.missed / self.at_stake) if self.at_stake > 0 else 0.0

    def expect(self, directions: Tensor, images: Tensor, e: Tensor, move: Tensor) -> None:
        """Of the next evaluation, nu moving by ``move``; ``directions`` need not be orthonormal."""
        if directions.shape[1] == 0:
            return
        basis, mixing = orthonormal(directions)
        before = basis.T @ e
        self.forecast = basis, before + (images @ mixing).T @ move, before, float(e @ e)


def orthonormal(directions: Tensor) -> tuple[Tensor, Tensor]:
    """V of span{b_i} without what is parallel, and M with V = B M."""
    lengths = directions.norm(dim=0)
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = directions * scale
    squares, vectors = torch.linalg.eigh((unit.T @ unit).double())
    kept = squares > 1e-5
    mixing = (vectors[:, kept] / squares[kept].sqrt()).to(unit) * scale[:, None]
    return directions @ mixing, mixing


class Split(Stepped):
    """With s at hand, so that e - s is (H + mu) nu."""

    def span(
        self,
        state: LeastSquaresState,
        adjoint: Tensors,
        product: Tensors,
        adjoint_residual: Tensors,
        residual: Tensors,
    ) -> None:
        self.s = flat(adjoint_residual) - flat(product)


class Galerkin(Split):
    """Least energy, as "energy", in the span of ``depth`` directions: nu and its last moves."""

    depth = 3
    with_multiplier = True

    def forget(self) -> None:
        self.history: list[tuple[Tensor, Tensor]] = []
        self.gain = Gain()

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        image = e - self.s
        self.gain.judge(e)
        moves = self.depth - self.with_multiplier
        self.history = [*self.history[-moves:], (nu, image)] if moves else [(nu, image)]
        points, images = (torch.stack(column, 1) for column in zip(*self.history, strict=True))
        B, W = points.diff(dim=1), images.diff(dim=1)
        if self.with_multiplier:
            B, W = (torch.cat((a, b[:, None]), 1) for a, b in ((B, nu), (W, image)))
        if B.shape[1] == 0:
            return nu - e / bound
        step = self.corrected(B, W, e, bound)
        self.gain.expect(B, W, e, step)
        return nu + step

    def corrected(self, B: Tensor, W: Tensor, e: Tensor, bound: float) -> Tensor:
        V, mixing = orthonormal(B)
        HV = W @ mixing
        T = V.T @ HV
        error = float(torch.linalg.matrix_norm(T - T.T)) / 2
        theta, E = torch.linalg.eigh((T + T.T) / 2)
        kept = theta > max(1e-3 * bound, 2 * error)
        V, HV, theta = V @ E[:, kept], HV @ E[:, kept], theta[kept]
        c = -self.gain.value * (V.T @ e) / theta
        return V @ c - (e + HV @ c) / bound


class LineGalerkin(Galerkin):
    """Along nu alone: no vector is kept but for the forecast."""

    depth = 1


class MoveOnly(Galerkin):
    """Along nu - nu_-1 alone, momentum whose length is known: two vectors."""

    depth, with_multiplier = 1, False


class Galerkin2(Galerkin):
    """With nu and its last move: two vectors in place of four."""

    depth = 2


class Galerkin4(Galerkin):
    """With nu and three moves: six vectors."""

    depth = 4


class Galerkin8(Galerkin):
    """With nu and seven moves: 14 vectors."""

    depth = 8


class Galerkin10(Galerkin):
    """With nu and nine moves: 18 vectors."""

    depth = 10


class OneVector(Split):
    """Momentum of known length from nu_-1 alone, one vector.

    H being symmetric, (H nu_-1)'nu was known a step ago and (H nu)'nu_-1 is now: inner products
    give all of B'HB. Without the image of the move the plain step is taken at the old nu. The gain
    is judged along nu_-1, where e is forecast from the same products.
    """

    with_multiplier = False

    def forget(self) -> None:
        self.last: Tensor | None = None
        self.numbers = (0.0, 0.0, 0.0, 0.0, 0.0)
        self.gain = Gain()

    def judge(self, e: Tensor, before: Tensor) -> None:
        """The forecast of e along nu_-1."""
        _, _, expected, stake, square = self.numbers
        direction = before[:, None] / max(float(before.norm()), 1e-300)
        length = float(before.norm()) or 1.0
        self.gain.forecast = (
            direction,
            torch.full_like(direction[0], expected / length),
            torch.full_like(direction[0], stake / length),
            square,
        )
        self.gain.judge(e)

    def remember(self, nu: Tensor, image: Tensor, after: Tensor, e: Tensor) -> None:
        """What the next evaluation needs."""
        cross = float(image @ after)
        self.last = nu
        expected = float(self.s @ nu) + cross
        self.numbers = (cross, float(image @ nu), expected, float(e @ nu), float(e @ e))

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        image, step = e - self.s, -e / bound
        if self.last is not None:
            self.judge(e, self.last)
            move, (cross, own, *_) = nu - self.last, self.numbers
            fresh, back = float(image @ nu), float(image @ self.last)
            mm, qm = fresh - back - cross + own, fresh - (back + cross) / 2
            k = 2 if self.with_multiplier else 1
            B = torch.stack((move, nu), 1)[:, :k]
            T = torch.tensor([[mm, qm], [qm, fresh]], dtype=torch.float64)[:k, :k]
            V, mixing = orthonormal(B)
            theta, E = torch.linalg.eigh(mixing.double().T @ T @ mixing.double())
            kept = theta > 1e-3 * bound
            V = V @ E[:, kept].to(V)
            step = step - self.gain.value * V @ ((V.T @ e) / theta[kept].to(V))
        self.remember(nu, image, nu + step, e)
        return nu + step


class OneVectorTwo(OneVector):
    """The same along nu, too."""

    with_multiplier = True


class NesterovJudged(OneVector):
    """Nesterov's momentum t / (t + 3), which starts anew uphill, times the gain."""

    def forget(self) -> None:
        super().forget()
        self.point: Tensor | None = None
        self.count = 0

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        if self.last is not None:
            self.judge(e, self.last)
        point = nu - e / bound
        move = point - (nu if self.point is None else self.point)
        self.count = 0 if float(e @ move) > 0 else self.count + 1
        self.point = point
        after = point + self.gain.value * self.count / (self.count + 3) * move
        self.remember(nu, e - self.s, after, e)
        return after


class QuasiNewton(Galerkin):
    """L-BFGS on pairs (d nu, H d nu) that curve by more than 1e-3 L, times the gain."""

    pairs = 10
    of_residuals = False

    def forget(self) -> None:
        super().forget()
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.point: tuple[Tensor, Tensor] | None = None

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        image = e if self.of_residuals else e - self.s
        self.gain.judge(e)
        if self.point is not None:
            s, y = nu - self.point[0], image - self.point[1]
            if float(s @ y) > 1e-3 * bound * float(s @ s) > 0:
                self.kept = [*self.kept[1 - self.pairs :], (s, y)]
        self.point = nu, image
        step = -e / bound
        if self.kept:
            step = step + self.gain.value * (-self.inverse(e, bound) - step)
            S, Y = (torch.stack(column, 1) for column in zip(*self.kept[-3:], strict=True))
            self.gain.expect(S, Y, e, step)
        return nu + step

    def inverse(self, e: Tensor, bound: float) -> Tensor:
        """The two loops, from 1 / L."""
        weights, left = [], e
        for s, y in reversed(self.kept):
            weights.append(float(s @ left) / float(s @ y))
            left = left - weights[-1] * y
        left = left / bound
        for (s, y), weight in zip(self.kept, reversed(weights), strict=True):
            left = left + (weight - float(y @ left) / float(s @ y)) * s
        return left


class QuasiNewton5(QuasiNewton):
    """With five pairs."""

    pairs = 5


class QuasiNewtonOfResiduals(QuasiNewton):
    """On pairs (d nu, d e): s moves with v."""

    of_residuals = True


class Capped(Stepped):
    """||nu|| <= ||grad_v f|| / mu, mu a share of L, on the plain step."""

    share_of_bound = 1e-3

    def moved(self, nu: Tensor, e: Tensor, bound: float, evaluation: Evaluation) -> Tensor:
        after = nu - e / bound
        slope = float(torch.stack(evaluation.slope_norms).norm())
        most, size = slope / (self.share_of_bound * bound), float(after.norm())
        return after * (most / size) if size > most else after


TRIED: dict[str, Callable[[], MultiplierRule]] = {
    "galerkin1": LineGalerkin,
    "galerkin2": Galerkin2,
    "galerkin4": Galerkin4,
    "galerkin8": Galerkin8,
    "galerkin10": Galerkin10,
    "move_only": MoveOnly,
    "one_vector": OneVector,
    "one_vector2": OneVectorTwo,
    "nesterov_judged": NesterovJudged,
    "quasi_newton": QuasiNewton,
    "quasi_newton5": QuasiNewton5,
    "quasi_newton_a": QuasiNewtonOfResiduals,
    "capped": Capped,
}
