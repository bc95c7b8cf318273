"""What the last step saw."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .evaluation import Norms

_SAID = {
    "upper_loss": "f(u, v)",
    "lower_loss": "g(u, v)",
    "residual_norm": "||grad_v g||",
    "adjoint_residual_norm": "||grad_v f + H q||, the certificate",
    "relative_certificate": "of ||grad_v f||: 0 where q is exact, 1 where q = 0",
    "upper_grad_norm": "||grad_u f + J q||, the hypergradient estimate",
    "penalty_weight": "gamma",
    "damping": "lambda, multiplies g in the lower level",
    "correction_gain": "share of the multiplier's correction that was trusted",
    "gradient_evaluations": "gradients and second-order products since construction",
}


@dataclass(frozen=True, repr=False)
class Metrics:
    """Numbers of the last evaluation, as detached 0-d tensors; all NaN before the first step.

    ``repr`` is a table of them with their units, for a person; it waits for the device.

    The losses are where the closures computed them, the rest is on the host already: the step
    fetched it to check that it is finite.

    Attributes:
        upper_loss: f(u, v), at the v at hand: what u is worth is f at a v trained to the end.
        lower_loss: g(u, v); ||r||^2 / 2 under ``FixedPoint``, where there is no g.
        residual_norm: ||r||_2, r = grad_v g(u, v) or v - Phi(u, v): how far v is from a lower
            solution.
        adjoint_residual_norm: ||grad_v f + H q||_2, the certificate: how far q is from the exact
            adjoint.
        relative_certificate: ||grad_v f + H q||_2 / ||grad_v f||_2: 0 at the exact adjoint, 1 at
            q = 0. Where grad_v f = 0, over what its norm last was above 0: then q has to return
            to 0.
        upper_grad_norm: ||grad_u f + J q||_2 over all upper parameters: the hypergradient
            estimate; NaN after a mere ``lower_step``, which has no use for it.
        penalty_weight: gamma, multiplies ||r||^2 / 2 or the value gap; of a relative one 0 until
            the first step.
        damping: lambda, multiplies g in the lower level.
        correction_gain: what share of the multiplier's correction was trusted when the evaluation
            began (``LeastSquares``): 1 where v stands still, 0 where batches leave the plain step;
            NaN where the rule makes none (``subspace=False``, maps, a v above 10 million numbers).
        gradient_evaluations: since construction: gradients of f and of g, and second-order
            products, each as one (two for a central difference); without the first step's check of
            dependences and the looks of ``"auto"`` at both engines.
    """

    upper_loss: Tensor
    lower_loss: Tensor
    residual_norm: Tensor
    adjoint_residual_norm: Tensor
    relative_certificate: Tensor
    upper_grad_norm: Tensor
    penalty_weight: Tensor
    damping: Tensor
    correction_gain: Tensor
    gradient_evaluations: int

    @classmethod
    def of(
        cls,
        upper_loss: Tensor,
        lower_loss: Tensor,
        norms: Norms,
        dual: tuple[float, float, float],
        count: int,
    ) -> Metrics:
        """The numbers of one evaluation.

        Args:
            upper_loss: f, 0-d.
            lower_loss: g, 0-d.
            norms: of its parts.
            dual: gamma, lambda and the gain of the correction, under which it was made.
            count: gradient evaluations so far.
        """
        numbers = torch.tensor(
            [
                norms.residual,
                norms.adjoint_residual,
                norms.certificate,
                norms.upper_grad,
                *dual,
            ],
            dtype=torch.float64,
        )
        residual, adjoint_residual, relative, upper_grad, weight, damping, gain = numbers.unbind()
        return cls(
            upper_loss,
            lower_loss,
            residual,
            adjoint_residual,
            relative,
            upper_grad,
            weight,
            damping,
            gain,
            count,
        )

    def __repr__(self) -> str:
        rows = [(name, f"{value:.6g}", _SAID[name]) for name, value in self.as_dict().items()]
        lines = [f"    {name:<21} {value:>12}  {said}" for name, value, said in rows]
        return "\n".join(["Metrics(", *lines, ")"])

    @classmethod
    def unknown(cls) -> Metrics:
        """Before the first step."""
        nan = torch.tensor(float("nan"))
        return cls(nan, nan, nan, nan, nan, nan, nan, nan, nan, 0)

    def as_dict(self) -> dict[str, float]:
        """By name, as Python numbers, for loggers; waits for the device."""
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}
