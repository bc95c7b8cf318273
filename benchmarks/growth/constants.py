"""What the model on paper starts from: bytes and passes per parameter of v, counted on real steps.

    python -m benchmarks.growth --only constants         # counts again and writes constants.json

Counted at 1e6 parameters, where batches of 16 and their activations do not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.growth import processes, traffic
from benchmarks.growth.processes import OURS, PLAIN
from benchmarks.speed import metrics, problems
from torch_penalty_bilevel import PenaltyBilevelOptimizer

FILE = Path(__file__).with_name("constants.json")
SIZE = 1e6
DTYPES = ("float32", "bfloat16")
PERIOD = 20
"""Steps from one probe of the curvature to the next."""
GATHERED = 4
"""Layers that ``fully_shard`` holds whole at once: one at work, the next, a gradient, what is
scattered of it. At most: where ours is largest none may be."""
Row = dict[str, Any]


def read() -> Row:
    """As they were last written."""
    return json.loads(FILE.read_text())


def counted(size: float = SIZE) -> Row:
    """Per parameter of v and step, by dtype of v and kind of step."""
    return {dtype: {name: of(name, dtype, size) for name in (OURS, PLAIN)} for dtype in DTYPES}


def of(name: str, dtype: str, size: float = SIZE) -> dict[str, float]:
    """``state``, ``peak`` and ``vector`` in bytes per parameter; gradients of a step, of a probe.

    ``state`` is held between steps: v, its gradient, moments, multiplier, the probe's direction.
    ``vector`` is of a step without a probe.
    """

    def make() -> metrics.Step:
        step, _ = _made(processes.network(size, dtype), name)
        return step

    problem = processes.network(size, dtype)
    count = sum(p.numel() for p in problem.lower)
    step, optimizer = _made(problem, name)
    for _ in range(processes.WARMUP):
        step()
    moved = traffic.moved(step).total()
    costs = [1.0]
    if isinstance(optimizer, PenaltyBilevelOptimizer):
        before, costs = optimizer.metrics.gradient_evaluations, list[float]()
        for _ in range(PERIOD):
            step()
            costs.append(optimizer.metrics.gradient_evaluations - before)
            before = optimizer.metrics.gradient_evaluations
    held = [*problem.lower, *(p.grad for p in problem.lower), *tree_leaves(optimizer.state_dict())]
    peak = metrics.peaks_of(make)["peak_bytes"]
    per = {"state": storage(held), "peak": peak, "vector": moved}
    return {key: round(value / count, 3) for key, value in per.items()} | {
        "gradients": min(costs),
        "gradients, mean": sum(costs) / len(costs),
    }


def with_processes(found: Row, rows: Iterable[Row]) -> Row:
    """With what two processes held, of rows by ``processes.measured``.

    ``peak, DDP``; and ``peak, FSDP2``, of which each process has its part, beside gathered layers.
    """
    for row in rows:
        if row["world"] != 2:
            continue
        for name in (OURS, PLAIN):
            own = found[row["dtype"]][name]
            peak = row[name]["peak_bytes"] / row["parameters"]
            if row["kind"] == processes.PARALLEL:
                own["peak, DDP"] = round(peak, 3)
            else:
                gathered = GATHERED * getattr(torch, row["dtype"]).itemsize / processes.LAYERS
                own["peak, FSDP2"] = round(2 * (peak - gathered), 3)
    return found


def _made(problem: problems.Problem, name: str) -> tuple[metrics.Step, Any]:
    if name == OURS:
        optimizer = processes.optimizer_of(problem)
        return lambda: optimizer.step(problem.f, problem.g), optimizer
    return processes.training(problem, rule := processes.rule_of(problem)), rule


def storage(values: Iterable[Any]) -> int:
    """Bytes of all tensors among ``values``, what they share counted once."""
    storages = [t.untyped_storage() for t in values if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def write(found: Row, path: Path = FILE) -> None:
    """For ``read``."""
    path.write_text(json.dumps(found, indent=2) + "\n")
