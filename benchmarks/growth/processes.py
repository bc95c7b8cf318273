"""A step on several processes: CPU time, memory and bytes on the wire of each.

Ours and plain training take their steps in turn on the same processes, of one thread each: data
parallel (``DistributedDataParallel``; ours with ``reduce="mean"``) and sharded (``fully_shard`` of
each layer and of the whole). v is an MLP of eight equal layers, so that the layer which
``fully_shard`` gathers is a small part of it.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.growth import fresh, wire
from benchmarks.growth.point import RATE
from benchmarks.speed import metrics, problems
from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity

Row = dict[str, Any]
Step = Callable[[], object]
OURS, PLAIN = "penalty", "plain training"
PARALLEL, SHARDED = "DDP", "FSDP2"
KINDS = (PARALLEL, SHARDED)
LAYERS = 8
WARMUP = 11
BATCH, SAMPLES = 16, 1000


def network(parameters: float, dtype: str = "float32") -> problems.Problem:
    """Eight layers h-h and the classes, of about so many parameters; the same on all processes."""
    torch.manual_seed(0)
    width = round((parameters / LAYERS) ** 0.5)
    made = problems.weighted(
        problems.mlp(*[width] * (LAYERS + 1)), problems.vectors(width), BATCH, SAMPLES
    )
    made.model.to(getattr(torch, dtype))
    cast = lambda batch: (batch[0].to(getattr(torch, dtype)), *batch[1:])  # noqa: E731
    return problems.Problem(
        made.model, made.weights, cast(made.upper_batch), cast(made.lower_batch)
    )


def spread(problem: problems.Problem, kind: str) -> problems.Problem:
    """``problem`` with its network as this process has it."""
    model = problem.model
    if kind == PARALLEL:
        model = DistributedDataParallel(model)
    elif kind == SHARDED:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return problems.Problem(model, problem.weights, problem.upper_batch, problem.lower_batch)


def optimizer_of(
    problem: problems.Problem, reduce: Literal["mean"] | None = None
) -> PenaltyBilevelOptimizer:
    """Finite differences, Adam on both levels, no correction (which rests beyond 1e7 numbers)."""
    return PenaltyBilevelOptimizer(
        torch.optim.Adam([problem.upper], lr=0.1),
        rule_of(problem),
        curvature="finite_difference",
        penalty=Stationarity(LeastSquares(subspace=False)),
        reduce=reduce,
    )


def rule_of(problem: problems.Problem) -> torch.optim.Optimizer:
    """The lower rule: one step changes what the network says by as much at every size."""
    width = problem.lower_batch[0].shape[1]
    return torch.optim.Adam(problem.lower, lr=RATE / width)


def penalty(problem: problems.Problem, reduce: Literal["mean"] | None = None) -> Step:
    """A step of ours."""
    optimizer = optimizer_of(problem, reduce)
    return lambda: optimizer.step(problem.f, problem.g)


def training(problem: problems.Problem, rule: torch.optim.Optimizer | None = None) -> Step:
    """A step of plain training of v, by ``backward``, which is where DDP's hooks are."""
    optimizer = rule or rule_of(problem)
    rows = problem.lower_batch[2]
    scores = problem.weights(rows)[:, 0].detach()

    def step() -> None:
        optimizer.zero_grad()
        problem.g(scores=scores).backward()
        optimizer.step()

    return step


def measured(
    parameters: float, kind: str, world: int, seconds: float, dtype: str = "float32"
) -> Row:
    """One row: what a step of each takes on each of ``world`` processes.

    Raises:
        RuntimeError: a process failed, and says why in its own output.
    """
    with tempfile.TemporaryDirectory() as folder:
        how = world, folder, parameters, kind, seconds, dtype
        ranks = fresh.run([functools.partial(_enter, rank, *how) for rank in range(world)])
    whole = network(parameters, dtype)
    row: Row = {
        "parameters": sum(p.numel() for p in whole.lower),
        "upper": whole.upper.numel(),
        "world": world,
        "kind": kind,
        "dtype": dtype,
    }
    for name in (OURS, PLAIN):
        each = [rank[name] for rank in ranks]
        row[name] = {key: statistics.mean(r[key] for r in each) for key in each[0]}
    return row


def _enter(
    rank: int, world: int, folder: str, parameters: float, kind: str, seconds: float, dtype: str
) -> Row:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = on_this_rank(parameters, kind, world, seconds, dtype)
    dist.barrier()
    dist.destroy_process_group()
    return found


def on_this_rank(
    parameters: float, kind: str, world: int, seconds: float, dtype: str = "float32"
) -> Row:
    """What a step of each takes here; all ranks take as many."""
    makers: dict[str, Callable[[], Step]] = {
        OURS: lambda: penalty(spread(network(parameters, dtype), kind), "mean"),
        PLAIN: lambda: training(spread(network(parameters, dtype), kind)),
    }
    found: Row = {name: metrics.peaks_of(make) for name, make in makers.items()}
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        for _ in range(WARMUP):
            step()
        step()  # no longer a first one of any kind
    for name, step in steps.items():
        with wire.Messages() as messages:
            step()
        found[name] |= {
            "payload": sum(m.payload for m in messages.seen),
            "sent": messages.sent(world),
            "messages": len(messages.seen),
            "largest": max((m.payload for m in messages.seen), default=0),
        }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    until = time.perf_counter() + seconds
    while _any(time.perf_counter() < until) or len(taken[OURS]) < 5:
        for name, step in steps.items():
            taken[name].append(metrics.seconds_of(step))
    for name, times in taken.items():
        found[name]["cpu"] = statistics.median(times)
    return found


def _any(wants: bool) -> bool:
    """Do all go on? Rank 0 says."""
    said = [wants]
    dist.broadcast_object_list(said, src=0)
    return said[0]
