"""Learned strengths of weight decay, one for each tensor, input feature or element of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..arguments import checked_number
from .regularizers import check_strength

Per = Literal["tensor", "feature", "element"]


class WeightDecay(nn.Module):
    r"""The term of g that decays a model's weights, with strengths that an upper level learns.

    .. math:: \tfrac12 \sum_k e^{u_k} \|p_k\|^2

    where the p_k are tensors, the columns of weight matrices (all weights that read one input
    feature or channel), or single elements. e^u is what torch.optim calls ``weight_decay``: the
    gradient is e^{u_k} p_k. On the log scale a step of u changes a strength by a factor.

    Of a model the trainable parameters of two or more dimensions take part: biases and the scales
    of norms are left out. Pairs name their tensors, and all of them take part.

    Decay only weights whose scale the loss sees. Of weights before a normalisation layer it does
    not: g falls as they shrink, has no minimum, and there is no v*(u) to differentiate. Name what
    lies behind the last such layer, the layer's own scale included (docs/symptoms.md, "g has no
    minimum"). For a network pass ``penalty=Stationarity(LeastSquares(share=0.1))``, or 0: the
    default's pull may train v on the upper data (docs/concepts/pull.md).

    The weights are read live and belong to the model: ``parameters()`` and ``state_dict()`` of this
    module hold the strengths only. A deep copy or a pickle follows what it refers to, so copy a
    model and its decay together, ``copy.deepcopy((model, decay))``; a copy of the decay alone has
    a model of its own that nobody trains. To save strengths use ``state_dict()``.

    Args:
        weights: the model, or (name, tensor) pairs as from ``named_parameters()`` of some of its
            layers. Of a model they are looked up by name in every call, so that weights that were
            replaced (``load_state_dict(assign=True)``) are seen.
        per: ``"tensor"``, ``"feature"`` (dimension 1 of the weights; of transposed convolutions
            these are outputs) or ``"element"``.
        initial: first strength e^u > 0, in units of g per squared weight.

    Shape:
        ``log_strengths``: u, one vector, in the order of the weights; ``strengths()`` cuts it.
        ``forward()``: 0-d.

    Raises:
        ValueError, TypeError: of a bad argument, naming it; nothing to decay; a tensor without
            features.

    Example:
        >>> from torch_penalty_bilevel import PenaltyBilevelOptimizer
        >>> model = nn.Linear(2, 1)
        >>> decay = WeightDecay(model, per="feature", initial=0.1)
        >>> optimizer = PenaltyBilevelOptimizer(decay.parameters(), model.parameters())
        >>> x, y = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> loss = optimizer.step(
        ...     lambda: (model(x) - y).square().mean(),
        ...     lambda: (model(x) - y).square().mean() + decay(),
        ... )
        >>> [(name, tuple(s.shape)) for name, s in decay.strengths().items()]
        [('weight', (2,))]
    """

    def __init__(
        self,
        weights: nn.Module | Iterable[tuple[str, Tensor]],
        per: Per = "tensor",
        initial: float = 1e-4,
    ) -> None:
        super().__init__()
        if per not in get_args(Per):
            raise ValueError(f"per must be one of {sorted(get_args(Per))}, got {per!r}")
        must, remedy = "be a finite number > 0", "on the log scale no step leads away from 0"
        initial = checked_number("initial", initial, must, remedy)
        self.per: Per = per
        # In tuples, which a module does not look into: these are not submodules and parameters.
        self._model: tuple[nn.Module, ...] = ()
        self._tensors: tuple[tuple[str, Tensor], ...] = ()
        if isinstance(weights, nn.Module):
            self._model = (weights,)
            pairs = [
                (n, p) for n, p in weights.named_parameters() if p.requires_grad and p.dim() > 1
            ]
        else:
            self._tensors = tuple(_checked_pair(pair) for pair in weights)
            pairs = list(self._tensors)
        self.names = tuple(name for name, _ in pairs)
        if not pairs:
            raise ValueError(
                "weights has nothing to decay: a model's trainable parameters of two or more "
                "dimensions take part; name others as pairs, WeightDecay([(name, tensor), ...])"
            )
        if len({*self.names}) < len(pairs):
            raise ValueError(f"weights has names that occur twice, got {list(self.names)}")
        self._shapes = tuple(_shape(per, name, tensor) for name, tensor in pairs)
        first = pairs[0][1]
        self.log_strengths = nn.Parameter(
            torch.full(
                (sum(shape.numel() for shape in self._shapes),),
                math.log(initial),
                dtype=torch.promote_types(first.dtype, torch.float32),
                device=first.device,
            )
        )
        check_strength(initial, self.log_strengths)

    def forward(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The term.

        Args:
            parameters: the weights by name, as ``torch.func.functional_call`` takes them (others
                in it are not looked at); default: the live ones.
        """
        live = self._live() if parameters is None else parameters
        missing = [name for name in self.names if name not in live]
        if missing:
            raise ValueError(
                f"parameters lacks {missing}; give all weights that were decayed at construction, "
                "under the same names"
            )
        total = self.log_strengths.new_zeros(())
        for name, strength in self.strengths().items():
            weight = live[name]
            squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
            if self.per == "feature":
                strength = strength.reshape(-1, *[1] * (weight.dim() - 2))
            term = (strength.to(squares.device) * squares).sum()
            total = total + term.to(total.device) / 2
        return total

    def strengths(self) -> dict[str, Tensor]:
        """e^u by name: 0-d, (features,) or shaped like the weight."""
        parts = self.log_strengths.exp().split([shape.numel() for shape in self._shapes])
        shaped = (part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True))
        return dict(zip(self.names, shaped, strict=True))

    def _live(self) -> Mapping[str, Tensor]:
        if self._model:
            return {name: _attribute(self._model[0], name) for name in self.names}
        return dict(self._tensors)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{list(self.names)}, per={self.per!r}"


def _attribute(model: nn.Module, name: str) -> Tensor:
    """As ``get_parameter``, which refuses the plain tensors that ``functional_call`` puts there."""
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _checked_pair(pair: object) -> tuple[str, Tensor]:
    if isinstance(pair, tuple) and len(pair) == 2:
        name, tensor = pair
        if isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point():
            return name, tensor
    raise TypeError(
        "weights must be a module or pairs (name, floating-point tensor) such as "
        f"model.named_parameters(), got {type(pair).__name__} in it"
    )


def _shape(per: Per, name: str, tensor: Tensor) -> torch.Size:
    if per == "feature" and tensor.dim() < 2:
        raise ValueError(
            f'per="feature" needs weights (out, in, ...), got {name!r} of shape '
            f'{tuple(tensor.shape)}; leave it out, or decay it in a block with per="tensor"'
        )
    shapes = {"tensor": (), "feature": tensor.shape[1:2], "element": tensor.shape}
    return torch.Size(shapes[per])
