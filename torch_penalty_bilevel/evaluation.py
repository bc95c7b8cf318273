"""What one evaluation of both losses yields, and its norms on the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .constraints import Faces
from .errors import NonFiniteError
from .tensors import OptionalTensors, Tensors, norms

_RESIDUAL, _PULL = "residual grad_v g", "tracker residual grad_v g(u, z)"
_SLOPE, _PRODUCT = "upper slope grad_v f", "second-order product H q"


class Subspace(NamedTuple):
    """Directions b_i of lower vectors with known images w_i = H b_i."""

    basis: tuple[Tensors, ...]
    """b_i."""
    images: tuple[Tensors, ...]
    """w_i."""
    inner_products: Tensor
    """Of all b_i, then all w_i, then a, with each other: a square matrix."""


class Evaluation(NamedTuple):
    """Everything one step needs, at one point (u, v) and for one adjoint estimate q."""

    upper_loss: Tensor
    """f, 0-d."""
    lower_loss: Tensor
    """g, 0-d; ||r||^2 / 2 where the lower level is a map."""
    adjoint: Tensors
    """q = nu + gamma r, shaped like v."""
    residual: Tensors
    """r = grad_v g(u, v), or v - Phi(u, v)."""
    adjoint_residual: Tensors
    """a = grad_v f + H q, with H = d2g/dv2; its norm certifies the hypergradient."""
    upper_grad: OptionalTensors
    """grad_u f + J q, the hypergradient estimate; None where nothing depends on the parameter."""
    slope_norms: Tensors
    """||grad_v f||_2 of each lower tensor, 0-d."""
    product_norms: Tensors
    """||H q||_2 of each lower tensor, 0-d."""
    probe_product: Tensors
    """H times the unit direction asked for by the multiplier rule; empty if it asked for none."""
    cost: int
    """Gradient evaluations, a second-order product counting as one or two."""
    curvature_terms: Tensors = ()
    """<q_i, (H q)_i> of each lower tensor, 0-d; together the curvature <q, H q>."""
    subspace: Subspace | None = None
    """Where the multiplier rule wants to correct q; None if it does not."""
    tracker: Tensors = ()
    """z, a second lower point; empty where the penalty keeps none."""
    tracker_loss: Tensors = ()
    """(g(u, z),); empty without z."""
    tracker_residual: Tensors = ()
    """grad_v g(u, z); empty without z."""
    lower_face: Faces = Faces()
    """The critical face of v; the vectors above lie in its span."""
    upper_face: Faces = Faces()
    """The critical face of u."""
    upper_values: Tensors = ()
    """h of each upper inequality."""
    upper_used: Tensors = ()
    """(share of workers whose losses depend on it, for each of u,); () with one worker."""


class Norms(NamedTuple):
    """Euclidean norms (not squared) of an evaluation's parts, and <q, H q>, as Python numbers."""

    adjoint: float
    residual: float
    adjoint_residual: float
    slope: float
    product: float
    probe_product: float
    upper_grad: float
    """NaN where only v was about to move."""
    curvature: float
    """<q, H q>, which has a sign; 0 where nothing asked for it."""
    tracker: float = 0.0
    """||z||; 0 without z."""
    silent: tuple[bool, ...] = ()
    """For each lower tensor: are r, grad_v f and H q exactly zero, as where no loss uses it?"""
    inner_products: tuple[float, ...] = ()
    """Of ``evaluation.subspace``, row by row; not looked at for infinities."""
    upper_used: tuple[float, ...] = ()
    """Of the evaluation."""
    asked: float = 0.0
    """||grad_v f|| here, or where that is 0 when it was last above."""

    @property
    def certificate(self) -> float:
        """||a|| relative to ||grad_v f||, or to what that was: where f goes silent q returns to 0.

        An absolute bound would have units, and a silence that asks for nothing lets u follow the
        multiplier of before.
        """
        if self.adjoint_residual == 0:
            return 0.0
        return self.adjoint_residual / self.asked if self.asked > 0 else math.inf

    def heard(self, gradients: Tensors) -> OptionalTensors:
        """None in the place of silent ones, so that the rule's momentum and decay wait too.

        As in torch, where the gradient of a tensor that a loss does not use is None. Double
        backward and torch.func say zero instead, and another worker's loss may use it.
        """
        pairs = zip(gradients, self.silent, strict=True)
        return tuple(None if is_silent else g for g, is_silent in pairs)


def measure(evaluation: Evaluation, names: Sequence[str], step: int, asked: float = 0.0) -> Norms:
    """Fetch all norms and raise if anything is infinite or NaN: the step's one wait for the device.

    An error before anything changes needs the numbers on the host; having them there, the
    multiplier rules and schedules can be plain Python.

    Args:
        evaluation: what was computed.
        names: of the upper parameters, for the error.
        step: number of the step under way, for the error.
        asked: ||grad_v f|| when it was last above 0.

    Raises:
        NonFiniteError: naming the quantity and the step.
    """
    upper = {n: g for n, g in zip(names, evaluation.upper_grad, strict=True) if g is not None}
    # In the order in which they are found: the first that is not finite is named.
    numbers, others = _on_host(
        {
            "upper loss f": (evaluation.upper_loss,),
            "lower loss g": (evaluation.lower_loss,),
            "adjoint nu + gamma r": evaluation.adjoint,
            _RESIDUAL: evaluation.residual,
            "lower loss g(u, z) at the tracker": evaluation.tracker_loss,
            _PULL: evaluation.tracker_residual,
            "tracker z": evaluation.tracker,
            _SLOPE: evaluation.slope_norms,
            _PRODUCT: evaluation.product_norms,
            "adjoint residual grad_v f + H q": evaluation.adjoint_residual,
            "curvature probe H p": evaluation.probe_product,
            "curvature <q, H q>": evaluation.curvature_terms,
            **{f"hypergradient of {n!r}": (g,) for n, g in upper.items()},
        },
        *(() if evaluation.subspace is None else (evaluation.subspace.inner_products,)),
        *evaluation.upper_used,
    )
    used = others[-1] if evaluation.upper_used else ()
    inner_products = () if evaluation.subspace is None else others[0]
    curvature = sum(numbers["curvature <q, H q>"])
    totals = {label: math.hypot(*parts) for label, parts in numbers.items()}
    for label, value in totals.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{label} is not finite in step {step}; nothing was changed. Lower the learning "
                "rates, clip gradients with a step hook on optimizer.lower or optimizer.upper, or "
                "look for log(0) and division by zero in the losses; under autocast use bfloat16, "
                "which needs no GradScaler"
            )
    _, _, adjoint, residual, _, _, tracker, slope, product, adjoint_residual, probe, _, *parts = (
        totals.values()
    )
    upper_grad = math.hypot(*parts) if names else math.nan
    return Norms(
        adjoint,
        residual,
        adjoint_residual,
        slope,
        product,
        probe,
        upper_grad,
        curvature,
        tracker,
        silent=_silent(numbers),
        inner_products=inner_products,
        upper_used=used,
        asked=slope if slope > 0 else asked,
    )


def _silent(numbers: dict[str, list[float]]) -> tuple[bool, ...]:
    vectors = [numbers[label] for label in (_RESIDUAL, _SLOPE, _PRODUCT, _PULL) if numbers[label]]
    return tuple(not any(lengths) for lengths in zip(*vectors, strict=True))


def _on_host(
    blocks: dict[str, Tensors], *matrices: Tensor
) -> tuple[dict[str, list[float]], list[tuple[float, ...]]]:
    """Each block's 0-d tensors and norms of vectors, and the entries of each of ``matrices``.

    One transfer for all.
    """
    flat = [t for block in blocks.values() for t in block]
    lengths = iter(norms([t for t in flat if t.dim() > 0]))
    flat = [next(lengths) if t.dim() > 0 else t for t in flat]
    if len({(t.device, t.dtype) for t in flat}) > 1:
        flat = [t.to(flat[0].device, torch.float64) for t in flat]
    found = torch.stack(flat)
    if matrices:
        wide = found.to(torch.promote_types(found.dtype, matrices[0].dtype))
        found = torch.cat([wide, *(m.to(wide).reshape(-1) for m in matrices)])
    numbers = iter(found.tolist())
    named = {label: [next(numbers) for _ in block] for label, block in blocks.items()}
    return named, [tuple(itertools.islice(numbers, m.numel())) for m in matrices]
