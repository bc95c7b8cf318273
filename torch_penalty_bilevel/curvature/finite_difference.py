"""Second-order products from a difference of gradients: no double backward anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor

from ..arguments import checked_number, checked_truth
from ..tensors import OptionalPair, OptionalTensors, Pair, Tensors, norm, scale
from ..undo.in_place import restored
from ..undo.random_state import RandomState
from ..undo.repeats import check_gradient_repeats
from . import autograd_graph as graph
from .double_backward import first_order
from .micro_batches import NEEDS_REPETITION as PARTS_NEED_REPETITION
from .micro_batches import MeanLoss, each
from .protocol import Curvature, Linearised, Loss

# (forward, central) relative steps ||delta|| / ||v||. A forward difference errs by
# O(h) + O(eps / h), a central one by O(h^2) + O(eps / h); the 32-bit and 16-bit values sit at the
# bottom of the measured error curves of small MLPs, CNNs and transformers, where activations
# add rounding of their own (see tests/curvature/test_finite_difference.py for the curve).
_RELATIVE_STEP = {
    torch.float64: (1e-7, 6e-6),
    torch.float32: (1e-4, 3e-3),
    torch.bfloat16: (6e-2, 6e-2),
    torch.float16: (3e-2, 3e-2),
}

# Of weights finer than what g is computed in, as under autocast: the shift itself is not rounded,
# only the gradients are, so shorter steps are better. The best is 0.003 to 0.06 (bfloat16) in an
# MLP, a CNN and a transformer along gradients, multipliers and noise; at this one H q errs by 0.03
# to 0.3 of its size, J q by as much, where double backward errs by 0.001 to 0.01 (``python -m
# benchmarks.coarse_products``). At 0.06 it was all of H q in the transformer.
_COMPUTED_STEP = {torch.bfloat16: 1.5e-2, torch.float16: 5e-3}

# Central, of float32 whose products round their factors to TF32: shifts of 1e-4 are lost there.
# On an H200 conv nets and LSTMs have their least error at 1e-3, MLPs at 1e-2 and above.
_TF32_STEP = 2e-3

_NEEDS_REPETITION = (
    "A finite difference needs the same data twice: draw the batch outside the closure, or use "
    'curvature="double_backward", which evaluates it once.'
)


class FiniteDifference(Curvature):
    r"""One more gradient at a shifted point instead of a second derivative.

    .. math:: (Jq, Hq) \approx \frac{\nabla g(u, v + \delta q) - \nabla g(u, v)}{\delta},
              \qquad \delta = h \lVert v \rVert_2 / \lVert q \rVert_2

    Forward: 2 plain gradients of g with r included, central: 3; activations as in plain training.
    Works with flash attention, compiled modules, cuDNN RNNs and (non-reentrant) checkpointing.
    Both evaluations see the same random numbers and the same buffers, and v is restored by copy,
    so it is bit-equal afterwards. Under autocast to 16 bits, where a difference over a short shift
    is rounding, h is longer, and products err by 3 to 30 % of their size (bfloat16; float16 by 1 to
    10 %): the certificate cannot fall below that share of ||H q||. Where double backward is
    possible, as "auto" finds out, it errs by 1 %.

    It is not autograd's Hessian where g has kinks: a ReLU network's gradient changes across
    a kink by a finite amount that the almost-everywhere Hessian omits.

    Args:
        relative_step: h above, dimensionless; None takes a value by dtype.
        central: difference over v + delta q and v - delta q. None: forward in float32 (cheaper),
            central in float64 (where accuracy is why it was chosen) and where the forward
            difference is too noisy: in 16 bits, and in float32 whose products CUDA rounds to TF32.

    Raises:
        NondeterministicClosureError: the closure draws other data when called again.
    """

    name = "finite_difference"

    def __init__(self, relative_step: float | None = None, central: bool | None = None) -> None:
        if relative_step is not None:
            length = "it is the length of the shift relative to ||v||, e.g. 1e-4 in float32"
            relative_step = checked_number("relative_step", relative_step, "lie in (0, 1)", length)
        self.relative_step = relative_step
        self.central = None if central is None else checked_truth("central", central)
        self._is_central = bool(central)
        self.renew()

    def renew(self) -> None:
        # Looking through a graph and calling a closure twice is done once.
        self._inspected_upper = self._closure_repeats = False
        self._computed_in: torch.dtype | None = None
        self._has_tf32 = False

    def looking(self, loss: Loss) -> Loss:
        """``loss``, seen as precisely computed as its next evaluation is; by itself it looks once.

        Of several parts the coarsest counts.
        """
        self._computed_in, self._has_tf32 = None, False

        def looked_at(part: Loss) -> Loss:
            def value_of_part(upper: Tensors, lower: Tensors) -> Tensor:
                value = part(upper, lower)
                found = graph.coarsest(value)
                dtypes = found, self._computed_in or found
                self._computed_in = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
                self._has_tf32 |= graph.rounds_to_tf32(value)
                return value

            return value_of_part

        return each(looked_at, loss)

    @property
    def is_coarse(self) -> bool:
        """Is g computed in 16 bits, for all that was noted?"""
        return self._computed_in is not None and torch.finfo(self._computed_in).bits <= 16

    def usual_step(self, lower: Tensors) -> float:
        """The relative step of an engine to which none is given."""
        return self._usual(lower)[0]

    @property
    def takes_differences(self) -> bool:
        return True

    @property
    def product_cost(self) -> int:
        return 2 if self._is_central else 1

    def gradient(self, loss: Loss, at: Pair) -> tuple[Tensor, OptionalPair]:
        result = first_order(loss, at, inspect=not self._inspected_upper)
        self._inspected_upper = True
        return result

    def linearise(self, loss: Loss, at: Pair, *, reusable: bool = False) -> Linearised:
        del reusable  # nothing is freed, so it always is
        random = RandomState(t.device for t in (*at.upper, *at.lower))
        looked_at = loss if self._closure_repeats else self.looking(loss)
        value, here = first_order(looked_at, at, inspect=not self._closure_repeats)
        if not self._closure_repeats:
            with random.replayed():
                again = first_order(loss, at, inspect=False)
            is_mean = isinstance(loss, MeanLoss)
            remedy = PARTS_NEED_REPETITION if is_mean else _NEEDS_REPETITION
            check_gradient_repeats((value, here), again, remedy)
            self._closure_repeats = True
        step, central = self._step_for(at.lower)
        radius = step * _positive_or_one(norm([v.detach() for v in at.lower]))

        def product(direction: Tensors) -> OptionalPair:
            length = norm(direction)
            factor = torch.where(length > 0, radius / length, 0.0)
            ahead = _gradient_at(loss, at, direction, factor, random)
            behind = _gradient_at(loss, at, direction, -factor, random) if central else here
            per_unit = length / (2 * radius if central else radius)
            upper = list(ahead.upper), list(behind.upper)
            lower = list(ahead.lower), list(behind.lower)
            del ahead, behind  # so that the lists alone hold them
            return OptionalPair(_difference(*upper, per_unit), _difference(*lower, per_unit))

        residual = tuple(
            torch.zeros_like(v, requires_grad=False) if r is None else r
            for r, v in zip(here.lower, at.lower, strict=True)
        )
        return Linearised(value, residual, product)

    def _stand_in(self, lower: Tensors) -> Tensors:
        """A tensor of every dtype that g is computed in beside those of v."""
        dtypes = {self._computed_in} - {None}
        for kind in {v.device.type for v in lower}:
            if torch.is_autocast_enabled(kind):
                dtypes.add(torch.get_autocast_dtype(kind))
        return tuple(torch.empty(0, dtype=dtype) for dtype in dtypes)

    def _step_for(self, lower: Tensors) -> tuple[float, bool]:
        usual, self._is_central = self._usual(lower)
        return self.relative_step or usual, self._is_central

    def _usual(self, lower: Tensors) -> tuple[float, bool]:
        dtype = _coarsest((*lower, *self._stand_in(lower)))
        tf32 = self._has_tf32 and dtype == torch.float32
        central = (tf32 or dtype != torch.float32) if self.central is None else self.central
        usual = _TF32_STEP if tf32 else _RELATIVE_STEP[dtype][central]
        if dtype != _coarsest(lower):
            usual = _COMPUTED_STEP.get(dtype, usual)
        return usual, central


def _coarsest(lower: Tensors) -> torch.dtype:
    # The coarsest parameter sets the step: a finer one would be rounded away there.
    return max((v.dtype for v in lower), key=lambda d: torch.finfo(d).eps)


def _gradient_at(
    loss: Loss, at: Pair, direction: Tensors, factor: Tensor, random: RandomState
) -> OptionalPair:
    with _shifted(at.lower, direction, factor), random.replayed():
        return first_order(loss, at, inspect=False)[1]


@contextlib.contextmanager
def _shifted(parameters: Tensors, direction: Tensors, factor: Tensor) -> Generator[None]:
    """Add ``factor * direction`` in place inside the block."""
    with restored(parameters):
        with torch.no_grad():
            torch._foreach_add_(parameters, scale(direction, factor))
        # Autocast would go on using its copies of the unshifted parameters.
        torch.clear_autocast_cache()
        yield


def _positive_or_one(length: Tensor) -> Tensor:
    return torch.where(length > 0, length, torch.ones_like(length))


def _difference(
    ahead: list[Tensor | None], behind: list[Tensor | None], per_unit: Tensor
) -> OptionalTensors:
    """(ahead - behind) * per_unit, subtracted in at least float32; both lists are emptied.

    Not in place, as autograd may return one tensor for two parameters, or one that is the user's;
    but what was subtracted is let go at once, so that no second copy of v comes about.
    """

    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        dtype = torch.promote_types(a.dtype, torch.float32)
        difference = a.to(dtype) - b.to(dtype)
        difference *= per_unit.to(a.device, dtype)
        return difference.to(a.dtype)

    ahead.reverse()
    behind.reverse()
    return tuple(one(ahead.pop(), behind.pop()) for _ in range(len(ahead)))
