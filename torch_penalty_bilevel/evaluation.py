"""What one evaluation of both losses yields, and its norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import NonFiniteError
from .tensors import OptionalTensors, Tensors, norm, norms


class Evaluation(NamedTuple):
    """Everything one step needs, at one point (u, v) and for one adjoint estimate q."""

    upper_loss: Tensor
    """f, 0-d."""
    lower_loss: Tensor
    """g, 0-d."""
    adjoint: Tensors
    """q = nu + gamma r, shaped like v."""
    residual: Tensors
    """r = grad_v g."""
    product: Tensors
    """H q, with H = d2g/dv2."""
    adjoint_residual: Tensors
    """a = grad_v f + H q; its norm is the certificate of the hypergradient."""
    upper_grad: OptionalTensors
    """grad_u f + J q, the hypergradient estimate; None where nothing depends on the parameter."""
    slope_norm: Tensor
    """||grad_v f||_2, 0-d."""
    probe: Tensors | None
    """A direction of unit length asked for by the multiplier rule, or None."""
    probe_product: Tensors | None
    """H times the probe."""


class Norms(NamedTuple):
    """Euclidean norms (not squared) of an evaluation's parts, 0-d tensors."""

    adjoint: Tensor
    residual: Tensor
    product: Tensor
    adjoint_residual: Tensor
    upper_grad: Tensor
    vanished: bool
    """Is the hypergradient exactly zero although the adjoint estimate is not?"""


def measure(evaluation: Evaluation, names: Sequence[str], step: int) -> Norms:
    """Take all norms and raise if anything is infinite or NaN, with one wait for the device.

    Args:
        evaluation: what was computed.
        names: of the upper parameters, for the error.
        step: number of the step under way, for the error.

    Raises:
        NonFiniteError: naming the quantity and the step.
    """
    present = [(n, g) for n, g in zip(names, evaluation.upper_grad, strict=True) if g is not None]
    labelled = {
        "upper loss f": evaluation.upper_loss,
        "lower loss g": evaluation.lower_loss,
        "adjoint nu + gamma r": norm(evaluation.adjoint),
        "residual grad_v g": norm(evaluation.residual),
        "upper slope grad_v f": evaluation.slope_norm,
        "second-order product H q": norm(evaluation.product),
        "adjoint residual grad_v f + H q": norm(evaluation.adjoint_residual),
    }
    if evaluation.probe_product is not None:
        labelled["curvature probe H p"] = norm(evaluation.probe_product)
    upper = norms([g for _, g in present])
    labels = [*labelled, *(f"hypergradient of {name!r}" for name, _ in present)]
    values = [*labelled.values(), *upper]
    # In float64 so that 16-bit losses and wide norms stack; f's device is where callers look.
    stacked = torch.stack([v.to(evaluation.upper_loss.device, torch.float64) for v in values])
    numbers = stacked.tolist()
    for label, value in zip(labels, numbers, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{label} is not finite in step {step}; nothing was changed. Lower the learning "
                "rates, clip gradients with a step hook on optimizer.lower or optimizer.upper, or "
                "look for log(0) and division by zero in the losses"
            )
    return Norms(
        adjoint=labelled["adjoint nu + gamma r"],
        residual=labelled["residual grad_v g"],
        product=labelled["second-order product H q"],
        adjoint_residual=labelled["adjoint residual grad_v f + H q"],
        upper_grad=torch.linalg.vector_norm(stacked[len(labelled) :]),
        vanished=numbers[2] != 0.0 and not any(numbers[len(labelled) :]),
    )
