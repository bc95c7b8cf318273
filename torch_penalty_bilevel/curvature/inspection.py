"""What "auto" has to know of a loss before it trusts its second derivative."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import errors
from ..errors import DoubleBackwardError
from ..tensors import Tensors
from ..undo.process_wide import ProcessWide
from . import autograd_graph as graph
from .protocol import Loss

_PLAIN_ATTENTION = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))


class Inspection:
    """What the graph of a loss, or of one of its parts, was seen to hold."""

    kink: str | None = None
    """An operation with a derivative that jumps."""
    fused_attention = False

    def noting(self, loss: Loss) -> Loss:
        """``loss``, refused where a custom function is behind it; fills this in."""

        def noted(upper: Tensors, lower: Tensors) -> Tensor:
            value = loss(upper, lower)
            if culprit := graph.custom_function(value):
                raise DoubleBackwardError(
                    f"nothing vouches for the second derivative of {culprit}",
                    'pass curvature="double_backward" if you know that it is right',
                )
            self.kink = self.kink or graph.kink(value)
            self.fused_attention |= graph.has_fused_attention(value)
            return value

        return noted

    def looking(self, loss: Loss) -> Loss:
        """``loss``; fills in ``kink``."""

        def looked_at(upper: Tensors, lower: Tensors) -> Tensor:
            value = loss(upper, lower)
            self.kink = self.kink or graph.kink(value)
            return value

        return looked_at


UNSTEADY = (
    "finite differences are in use because they must be, and products with neighbouring steps "
    "differ by {spread:.1g} of their size: kinks (ReLU, max) or rounding make the hypergradient "
    "unreliable"
)


def with_plain_attention(loss: Loss) -> Loss:
    """``loss`` with softmax(Q K' / sqrt(d)) V written out, which can be differentiated twice."""

    def plain(upper: Tensors, lower: Tensors) -> Tensor:
        with _PLAIN_ATTENTION:
            return loss(upper, lower)

    return plain


def warn(message: str) -> None:
    """Warn of the engine in use, with what to set."""
    remedy = (
        'To have curvature="double_backward", use operations that torch can differentiate twice '
        "(sdpa_kernel(SDPBackend.MATH) for attention, torch.backends.cudnn.flags(enabled=False) "
        "for an RNN on CUDA, the module without torch.compile); "
        'curvature="finite_difference" says that differences are wanted'
    )
    errors.warn(f"{message.rstrip('. ')}. {remedy}")
