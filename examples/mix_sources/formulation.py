"""The bilevel problem of ``mix_sources``.

    min over u of  f(v) = L(v; clean text)
    where v minimises  g(u, v) = sum_k w_k L(v; source k),  w = SourceWeights(u)

L is the mean cross entropy of the next letter, in nats, w lies on the simplex and keeps some
entropy, v are the parameters of a transformer. Its attention is the fused one, which has no second
derivative: products with H are finite differences of gradients.

A step of training sees as many windows of text as w allots: ``windows`` in all, at least one of
each source. L(v; source k) is the mean over those of source k, so that g is unbiased however they
are allotted, and text that has no weight is not paid for. When u moves all sources get equally many
windows: their products with q are compared, and one window says little.

u moves once in m steps of v. In between v takes plain steps on g (``plain_lower_step``), which cost
what training costs: no gradient of f, no product. This is sound because

- both kinds of step move v by the gradient r of g, through the same Adam with the same moments;
  the pull towards f is off (share = 0), so that v never trains on the clean text;
- the multiplier q, which solves H q = -grad_v f by one step of descent at a time, is kept as it is
  meanwhile. It then lags behind v by m steps of training. H and grad_v f change little in these
  while rates are small: q is late, and not wrong, since nothing in it depends on the steps between.
  What it loses is m - 1 of m steps of its own descent.
- where q has not been solved, it is a sum of the latest -grad_v f, damped along the stiffest
  directions. So the hypergradient of w_k, <grad L_k, q>, is T1-T2's product of gradients with the
  noise of single batches averaged out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.mix_sources.problem import Mixture
from examples.mix_sources.transformer import Size, make_transformer
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.nn import SourceWeights


class Mixing:
    """Both levels, and both losses on the windows of text at hand.

    Args:
        mixture: the text.
        size: of the transformer; its first parameters are those of the mixture's seed.
        windows: of the sources, per step of training; f sees half as many.
        entropy_floor: of the weights, in nats.
        compiled: compile the transformer?
    """

    def __init__(
        self,
        mixture: Mixture,
        size: Size,
        windows: int,
        entropy_floor: float = 0.0,
        compiled: bool = False,
    ) -> None:
        self.mixture, self.size, self.windows = mixture, size, windows
        device = mixture.sources.device
        self.model = make_transformer(size, mixture.seed).to(device)
        self.weights = SourceWeights(len(mixture.names), entropy_floor, device=device)
        self.compiled = compiled
        self.scores = self.ready(self.model)
        self.hold(self.weights().detach())

    def ready(self, model: torch.nn.Module) -> Any:
        """Compiled, if that is asked for."""
        return torch.compile(model) if self.compiled else model

    def hold(self, weights: Tensor) -> None:
        """From now on plain steps have these weights, (K,), and windows are allotted by them."""
        self.held = weights

    def draw(self, equally: bool = False) -> None:
        """New windows, (n, context + 1): clean ones, and of the sources, by weight or equally."""
        device, count = self.held.device, len(self.held)
        weights = [1 / count] * count if equally else self.held.tolist()
        self.counts = torch.tensor(allotted(weights, self.windows), device=device)
        self.source = torch.arange(count, device=device).repeat_interleave(self.counts)
        length = self.size.context + 1
        starts = self.mixture.sources.shape[1] - length + 1
        first = torch.randint(starts, (len(self.source), 1), device=device)
        places = first + torch.arange(length, device=device)
        self.drawn = self.mixture.sources[self.source[:, None], places]
        self.clean = windows_of(self.mixture.clean, length, max(1, self.windows // 2))

    def upper_loss(self) -> Tensor:
        """The clean text's: f."""
        return letter_losses(self.scores, self.clean).mean()

    def lower_loss(self) -> Tensor:
        """The sources': g."""
        return self.weights() @ self.source_losses()

    def plain_loss(self) -> Tensor:
        """The same where the weights are held."""
        return self.held @ self.source_losses()

    def source_losses(self) -> Tensor:
        """L(v; source k), (K,); 0 where no window was allotted."""
        return self.per_source(letter_losses(self.scores, self.drawn))

    def per_source(self, losses: Tensor) -> Tensor:
        """Means, (K,), of what windows have, (n, context)."""
        sums = losses.new_zeros(len(self.counts)).index_add(0, self.source, losses.mean(1))
        return sums / self.counts.clamp(min=1)


def penalty_optimizer(task: Mixing, upper_lr: float, lower_lr: float) -> PenaltyBilevelOptimizer:
    """All that the penalty method asks for."""
    return PenaltyBilevelOptimizer(
        upper_rule(task, upper_lr),
        task.model.parameters(),
        lower_lr=lower_lr,
        curvature="finite_difference",
        penalty=Stationarity(LeastSquares(share=0.0, subspace=False)),
    )


def upper_rule(task: Mixing, rate: float) -> torch.optim.Adam:
    """For u: gradients fall by orders of magnitude along a run, with f's and with the weights.

    Adam's usual memory of 1,000 squares would hold u where the first hundred steps have left it.
    """
    return torch.optim.Adam(task.weights.parameters(), lr=rate, betas=(0.9, 0.95))


def letter_losses(scores: torch.nn.Module, windows: Tensor) -> Tensor:
    """Cross entropy of every next letter, (n, context)."""
    return cross_entropy(scores(windows[:, :-1]).transpose(1, 2), windows[:, 1:], reduction="none")


def windows_of(text: Tensor, length: int, count: int) -> Tensor:
    """``count`` random windows of ``text``."""
    first = torch.randint(len(text) - length + 1, (count, 1), device=text.device)
    return text[first + torch.arange(length, device=text.device)]


def allotted(weights: list[float], windows: int) -> list[int]:
    """How many of ``windows`` each source gets: one, and its share of the rest.

    Those of weight 0 get none. What rounding leaves goes to the largest remainders.
    """
    used = [weight > 0 for weight in weights]
    shares = [weight / sum(weights) * (windows - sum(used)) for weight in weights]
    counts = [int(share) + one for share, one in zip(shares, used, strict=True)]
    order = sorted(range(len(weights)), key=lambda k: int(shares[k]) - shares[k])
    for k in order[: windows - sum(counts)]:
        counts[k] += 1
    return counts
