"""What a lower level needs whose parameters are spread over processes (``fully_shard``)."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..curvature import Automatic, Curvature, FiniteDifference
from ..levels import named, parameters
from ..tensors import is_sharded
from ..workers import Workers


def served(
    engine: Curvature,
    upper: Optimizer,
    lower: Optimizer,
    workers: Workers,
    constraint: Any,
    lower_is_map: bool,
) -> Curvature:
    """The engine for these levels: of sharded ones finite differences, for ``"auto"`` too.

    Gradients of sharded parameters come from ``backward()`` alone, and none has a graph of its own.

    Raises:
        ValueError: what cannot be done with shards, naming the remedy.
    """
    above = [name for name, p in named(upper, "upper") if is_sharded(p)]
    if above:
        raise ValueError(
            f"the upper parameters {above} are sharded, and rows that are not in the batch could "
            "not be told; keep them out of fully_shard (its ignored_params)"
        )
    if not any(map(is_sharded, parameters(lower))):
        return engine
    if lower_is_map:
        raise ValueError(
            "a lower level given as a map needs products with a transposed Jacobian, which no "
            "engine forms of sharded parameters; keep v out of fully_shard: plain modules or "
            'DistributedDataParallel share the problem, with reduce="mean"'
        )
    if not isinstance(engine, (Automatic, FiniteDifference)):
        raise ValueError(
            f'curvature="{engine.name}" cannot serve sharded lower parameters, whose gradients '
            'have no graph; use "finite_difference" or "auto"'
        )
    if not workers.is_shared:
        raise ValueError(
            'sharded lower parameters belong to several processes; pass reduce="mean", so that '
            "these share u and the losses too"
        )
    if constraint is not None:
        raise ValueError("lower_constraint cannot hold sharded parameters; leave it away")
    check_decay(lower)
    return FiniteDifference() if isinstance(engine, Automatic) else engine


def check_comparable(lower: Optimizer) -> None:
    """Raise ``ValueError`` where exact hypergradients cannot be had for comparison."""
    if any(map(is_sharded, parameters(lower))):
        raise ValueError(
            "check_hypergradient solves with exact products, which sharded parameters have not; "
            "check a small copy of the model that is not sharded"
        )


def check_decay(lower: Optimizer) -> None:
    """Raise ``ValueError`` for decay of shards, which no closure gathers."""
    decays = [group.get("weight_decay", 0.0) for group in lower.param_groups]
    if any(decays):
        raise ValueError(
            f"lower has weight_decay={decays} for sharded parameters, of which the loss sees what "
            "a forward pass gathers; pass 0 and put the decay in the forward pass of the module"
        )
