"""Linear heads of several tasks, applied at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_count, checked_number, checked_truth
from . import checked


class StackedHeads(nn.Module):
    r"""T linear heads, one for each task: y_t = x_t W_t' + b_t, in one batched product.

    The lower level of few-shot learning, with a shared representation above. Gradients of one
    task's outputs stay in its head, so the Hessian of a sum of task losses is block diagonal.

    With ``cosine=True`` the scaled cosine of the published experiments, between the inputs and the
    rows of W, both longer by one entry, (x, wat) and (W_k, b_k):

    .. math::
        y_k = scale\, \frac{\langle x, W_k\rangle + wat\, b_k}
                           {\sqrt{\|x\|^2 + wat^2}\, \sqrt{\|W_k\|^2 + b_k^2}}

    It does not see the length of (W_k, b_k): the lower Hessian is singular along it. Of a row of
    zeros (W_k, b_k) the cosine is undefined: its scores and their gradients are 0 there.

    Args:
        tasks: T.
        in_features: of each input.
        out_features: classes of each task.
        bias: with b; a cosine needs it.
        cosine: the scaled cosine in place of the linear map.
        scale: of the cosine; 10 as published.
        augmentation: wat > 0, the entry that lengthens x; 1e-3 as published.
        dtype: of the weights; default: torch's.
        device: where they lie.

    Shape:
        ``weight``: (T, out, in), ``bias``: (T, out), as T times ``nn.Linear``;
        ``forward``: (T, n, in) to (T, n, out).

    Raises:
        ValueError, TypeError: of a bad argument or inputs of another shape.

    Example:
        >>> heads = StackedHeads(tasks=3, in_features=8, out_features=5)
        >>> features, labels = torch.randn(3, 10, 8), torch.randint(5, (3, 10))
        >>> scores = heads(features)
        >>> loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        >>> scores.shape
        torch.Size([3, 10, 5])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        tasks: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        cosine: bool = False,
        scale: float = 10.0,
        augmentation: float = 1e-3,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        counts = {"tasks": tasks, "in_features": in_features, "out_features": out_features}
        for name, count in counts.items():
            check_count(name, count, at_least=1)
        for name, number in (("scale", scale), ("augmentation", augmentation)):
            checked_number(name, number, "be a finite number > 0", "published: 10 and 1e-3")
        bias, cosine = checked_truth("bias", bias), checked_truth("cosine", cosine)
        if cosine and not bias:
            raise ValueError(
                "cosine=True needs bias=True: b_k is an entry of the lengthened weight"
            )
        dtype = checked.floating(dtype)
        self.cosine, self.scale, self.augmentation = cosine, scale, augmentation
        self.weight = nn.Parameter(
            torch.empty(tasks, out_features, in_features, dtype=dtype, device=device)
        )
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(tasks, out_features, dtype=dtype, device=device))
            if bias
            else None,
        )
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw all heads anew, in place: as ``nn.Linear``; of cosines W ~ N(0, 0.01^2), b = 1e-3.

        After it call ``optimizer.restart_lower()``: these are other lower problems.
        """
        bound = self.weight.shape[2] ** -0.5
        if self.cosine:
            self.weight.normal_(std=0.01)
        else:
            self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.fill_(1e-3) if self.cosine else self.bias.uniform_(-bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of each task's head on its inputs."""
        tasks, _, features = self.weight.shape
        if inputs.dim() != 3 or (inputs.shape[0], inputs.shape[2]) != (tasks, features):
            raise ValueError(
                f"inputs must be of shape (tasks, n, in_features) = ({tasks}, n, {features}), got "
                f"{tuple(inputs.shape)}; the same inputs for all: x.expand({tasks}, -1, -1)"
            )
        columns = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(inputs, columns)
        bias = self.bias.unsqueeze(1)
        if not self.cosine:
            return torch.baddbmm(bias, inputs, columns)
        products = torch.baddbmm(self.augmentation * bias, inputs, columns)
        lengths = (inputs.square().sum(2, keepdim=True) + self.augmentation**2).sqrt()
        squares = columns.square().sum(1, keepdim=True) + bias.square()
        # Zeros, which sqrt has no slope at: a size of 1 leaves scores of 0 with no pull.
        none = squares == 0
        products = products.masked_fill(none, 0.0)
        sizes = squares.masked_fill(none, 1.0).sqrt()
        return self.scale * products / (lengths * sizes)

    def extra_repr(self) -> str:
        """The arguments."""
        tasks, out, features = self.weight.shape
        return f"{tasks}, {features}, {out}, bias={self.bias is not None}, cosine={self.cosine}"
