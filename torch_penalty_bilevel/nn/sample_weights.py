"""One weight per sample, addressed by index."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_count, checked_truth, is_number
from . import checked


class SampleWeights(nn.Module):
    r"""Importances of samples: w_i = sigmoid(a_i) in (0, 1), with a the parameter ``logits``.

    Give ``parameters()`` to the optimizer as the upper level and weigh the lower losses. Samples
    that are not in the batch keep their weight and their moments (see ``PenaltyBilevelOptimizer``).

    Mehra & Hamm (2021) write w = (tanh(a') + 1) / 2, which is sigmoid(2 a'): the same weights from
    logits twice as large, so that a is the log-odds of "keep". Their rates then read: of Adam twice
    as large (3 becomes 6), of SGD four times. A weight near 0 or 1 has nearly no gradient;
    ``renormalise_`` keeps it away from there.

    Args:
        count: N, the number of samples.
        initial: first weights in (0, 1): a number, or a tensor (N,).
        sparse: the gradient holds the samples of the batch only, in a sparse tensor: a step costs
            as much as the batch, not N. Give the optimizer a ready ``torch.optim.SparseAdam`` or
            ``SGD`` over these weights (Adam refuses them) and no constraint. With ``curvature``
            "functional" gradients are dense all the same.
        dtype: of the weights; default: torch's.
        device: where they lie.

    Shape:
        ``logits``, ``forward()``: (N,); ``forward(index)``: as index.

    Raises:
        ValueError, TypeError: of a bad argument, naming it.

    Example:
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> wrong = torch.tensor([False, False, True])
        >>> labels = torch.where(wrong, -1.0, 1.0)
        >>> weights, v = SampleWeights(3), torch.zeros((), requires_grad=True)
        >>> optimizer = PenaltyBilevelOptimizer(
        ...     weights.parameters(), [v], upper_lr=0.1, lower_lr=0.1
        ... )
        >>> for _ in range(100):
        ...     loss = optimizer.step(
        ...         lambda: (v - 1) ** 2, lambda: weights.weighted_mean((v - labels) ** 2)
        ...     )
        >>> (weights() < 0.5).tolist()
        [False, False, True]
    """

    def __init__(
        self,
        count: int,
        initial: float | Tensor = 0.5,
        sparse: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_count("count", count, at_least=1)
        dtype = checked.floating(dtype)
        if not is_number(initial) and not isinstance(initial, Tensor):
            raise TypeError(f"initial must be a number or a tensor, got {initial!r}")
        weights = torch.as_tensor(initial).detach().to(device, torch.float64)
        if weights.dim() and weights.shape != (count,):
            raise ValueError(
                f"initial must be a number or of shape ({count},), got {tuple(weights.shape)}"
            )
        if not bool(((weights > 0) & (weights < 1)).all()):
            raise ValueError(
                "initial must lie in (0, 1), between weights that nothing could move; clamp it to "
                f"[1e-5, 1 - 1e-5], got {initial!r}"
            )
        self.sparse = checked_truth("sparse", sparse)
        logits = weights.logit().expand(count).to(dtype, copy=True)
        rounded = logits.sigmoid()
        if bool(((rounded == 0) | (rounded == 1)).any()):
            raise ValueError(
                f"initial must lie in (0, 1) as {dtype} too, where it rounds to an end and nothing "
                f"could move it; clamp it to [eps, 1 - eps], eps={torch.finfo(dtype).eps:.4g}, got "
                f"{initial!r}"
            )
        self.logits = nn.Parameter(logits)

    @classmethod
    def from_agreement(
        cls,
        predictions: Tensor,
        labels: Tensor,
        high: float = 0.6,
        low: float = 0.4,
        sparse: bool = False,
        dtype: torch.dtype | None = None,
    ) -> SampleWeights:
        """Weights of what a model, trained on trusted data, makes of the given labels.

        As published (0.6 and 0.4 on MNIST, 0.8 and 0.2 on CIFAR-10 and SVHN): ``high`` where the
        predicted class is the label, else ``low``.

        Args:
            predictions: class numbers (N,), or scores (N, classes >= 2) whose largest counts.
            labels: class numbers (N,).
            high: in (0, 1).
            low: in (0, 1).
            sparse: as of the class.
            dtype: likewise; the device is that of the labels.
        """
        if predictions.dim() == 2:
            predictions = _largest(predictions)
        if predictions.is_floating_point() or labels.is_floating_point():
            raise TypeError(
                "predictions must be class numbers (N,) or scores (N, classes), and labels class "
                f"numbers, got {predictions.dtype} and {labels.dtype}"
            )
        if labels.dim() != 1 or predictions.shape != labels.shape:
            raise ValueError(
                "predictions and labels must be of the same samples, got shapes "
                f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
            )
        agrees = (predictions.to(labels.device) == labels).double()
        initial = low + (high - low) * agrees
        return cls(len(labels), initial, sparse, dtype, labels.device)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The weights of the samples with these numbers.

        Args:
            index: integers in [0, N) of any shape; default: all samples (with a dense gradient).

        Raises:
            TypeError: an index that is not made of integers, a mask, say.
            IndexError: integers outside of [0, N). On an accelerator its own assertion.
        """
        if index is None:
            return self.logits.sigmoid()
        count = len(self.logits)
        index = checked.numbers(index, count, self.logits.device)
        with checked.within(count, "samples"):
            if not self.sparse:
                return self.logits[index].sigmoid()
            logits = torch.gather(self.logits, 0, index.reshape(-1), sparse_grad=True)
        return logits.reshape(index.shape).sigmoid()

    def weighted_mean(
        self, losses: Tensor, index: Tensor | None = None, normalised: bool = True
    ) -> Tensor:
        r"""The loss of a batch, :math:`\sum_i w_i l_i / \sum_i w_i`, as published.

        Args:
            losses: l of the samples, (B,); of all N without ``index``.
            index: their numbers, (B,).
            normalised: False: the plain mean of w_i l_i, in which all weights together scale the
                loss against other terms of g (weight decay, say).
        """
        weights = self(index)
        if losses.shape != weights.shape:
            raise ValueError(
                f"losses must have one entry for each weight, {tuple(weights.shape)}, got "
                f'{tuple(losses.shape)}; take them with reduction="none"'
            )
        if not losses.numel():
            raise ValueError("losses is empty, which has no mean; leave empty batches out")
        weighed = weights * losses
        normalised = checked_truth("normalised", normalised)
        return weighed.sum() / weights.sum() if normalised else weighed.mean()

    @torch.no_grad()
    def renormalise_(self, mean: float = 0.5, margin: float = 1e-5) -> None:
        """Scale to a mean, as published after each epoch: w <- clip(mean w / mean(w)).

        ``weighted_mean`` sees only ratios of weights; this takes up their drift. The rule's moments
        are not touched.

        Args:
            mean: of the weights before they are clipped, in (0, 1).
            margin: they are clipped to [margin, 1 - margin]; in [1e-7, 0.5). At the upper end half
                a unit of rounding at least (0.004 in bfloat16), since 1 itself cannot be moved.
        """
        if not 0 < mean < 1 or not 1e-7 <= margin < 0.5:
            raise ValueError(
                "mean must lie in (0, 1) and margin in [1e-7, 0.5), between weights that nothing "
                f"could move, got mean={mean!r} and margin={margin!r}"
            )
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        weights = self.logits.to(wide).sigmoid()
        scaled = (mean * weights / weights.mean()).clamp(
            margin, 1 - max(margin, torch.finfo(self.logits.dtype).eps / 2)
        )
        self.logits.copy_(scaled.logit())

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{len(self.logits)}, sparse={self.sparse}"


def _largest(scores: Tensor) -> Tensor:
    if scores.shape[1] < 2:
        raise ValueError(
            f"predictions of shape {tuple(scores.shape)} are scores of {scores.shape[1]} classes, "
            "of which the largest says nothing; give class numbers (N,): predictions.squeeze(1), "
            "or (scores > 0).squeeze(1).long() of one logit per sample"
        )
    if bool(scores.isnan().any()):
        raise ValueError(
            "predictions has NaN scores, which would count as the largest; leave these samples out"
        )
    return scores.argmax(1)
