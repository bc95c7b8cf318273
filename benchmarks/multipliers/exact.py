"""A rule without error: q solves the adjoint equation at the present (u, v)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from torch_penalty_bilevel import LeastSquares
from torch_penalty_bilevel.evaluation import Evaluation, Norms
from torch_penalty_bilevel.multipliers.least_squares_state import LeastSquaresState
from torch_penalty_bilevel.tensors import Tensors


class Exact(LeastSquares):
    """Before every evaluation that serves u, q is set to the exact one; v moves as by default.

    What is left of the error is then v's, which has not followed u yet. Between those evaluations
    q stays. With minibatches q is that of all data, the best a multiplier can be.
    """

    reads_residual = True
    """So that the optimizer keeps it: by it ``adjoint`` knows who asks."""

    def __init__(self) -> None:
        super().__init__(subspace=False)
        self._solve: Callable[[], Tensor] | None = None
        self._every = 1
        self._residual: Tensors = ()

    def take(self, solve: Callable[[], Tensor], lower_steps: int) -> None:
        """Take q from ``solve`` (for the only lower tensor) in each step's last lower step."""
        self._solve, self._every = solve, lower_steps

    def adjoint(self, state: LeastSquaresState, residual: Tensors) -> Tensors:
        # The optimizer asks once more after the step, with the residual of the same evaluation.
        asked_again = residual is self._residual
        self._residual = residual
        if self._solve is None or asked_again or (state.steps + 1) % self._every:
            return state.multiplier
        return (self._solve(),)

    def lower_update(
        self, state: LeastSquaresState, evaluation: Evaluation, norms: Norms
    ) -> tuple[Tensors, LeastSquaresState]:
        direction, after = super().lower_update(state, evaluation, norms)
        if self._solve is not None:
            after = after.but(multiplier=evaluation.adjoint)
        return direction, after
