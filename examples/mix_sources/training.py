"""A run of one method: its budget, what is seen along it, what it leaves."""

from __future__ import annotations

import torch

from examples.mix_sources.formulation import Mixing, letter_losses
from examples.mix_sources.methods import METHODS, Method, Rates
from examples.shared.record import Line
from examples.shared.run import Run
from examples.shared.solvers import anneal

LOOKS = 24
SOME, ALL = 128, 1024  # test windows along the run and at its end


def train(
    name: str, task: Mixing, budget: int, every: int, run: Run, rates: Rates | None = None
) -> Line:
    """The method ``name`` for ``budget`` steps of training, rates falling to 0 along a cosine.

    Args:
        name: of the method.
        task: at its start.
        budget: steps of training; of DoReMi each of its three trainings; "longer" takes half more.
        every: m.
        run: shows and keeps what happens.
        rates: others than the method's own.
    """
    kind, own = METHODS[name]
    method, path = kind(task, rates or own, every), []
    budget = round(budget * kind.length)
    steps = budget * method.stages
    looks = {round(steps * (n + 1) / LOOKS) for n in range(LOOKS)} | {steps}
    fresh = True
    for step in run.steps(steps, *method.kept, path):
        if fresh:
            method.refresh()  # of a checkpoint
            fresh = False
        stage, number = divmod(step, budget)
        anneal(method.rules, number / budget)
        method.step(number, stage)
        if step + 1 in looks:
            with run.paused():
                path.append({"step": step + 1, "seconds": run.seconds, **seen(task, method, stage)})
                run.show(step, **{k: v for k, v in path[-1].items() if k in ("test", "clean")})
    weights = method.weights()
    return {
        "test": held_out_loss(task, ALL),
        **shares(task, weights.tolist()),
        "names": task.mixture.names,
        "kinds": task.mixture.kinds,
        "weights": weights.tolist(),
        "path": path,
        "seconds": run.seconds,
    }


def seen(task: Mixing, method: Method, stage: int) -> Line:
    """The weights, and the losses of the transformer once it trains."""
    line: Line = {"weights": method.weights().tolist()}
    if stage == method.stages - 1:
        line["test"] = held_out_loss(task, SOME)
    return line


def shares(task: Mixing, weights: list[float]) -> Line:
    """The largest weight of a corrupted source, in mean weights, and the sum over all kinds."""
    kinds = task.mixture.kinds
    sums = {kind: 0.0 for kind in ("wanted", "other", "corrupted")}
    for kind, weight in zip(kinds, weights, strict=True):
        sums[kind] += weight
    corrupted = [w for w, kind in zip(weights, kinds, strict=True) if kind == "corrupted"]
    return {"worst": max(corrupted) * len(weights), **sums}


@torch.no_grad()
def held_out_loss(task: Mixing, count: int) -> float:
    """Mean loss of ``count`` windows of the test text that lie at equal distances."""
    text, length = task.mixture.test, task.size.context + 1
    firsts = torch.linspace(0, len(text) - length, count).long().unique().to(text.device)
    windows = text[firsts[:, None] + torch.arange(length, device=text.device)]
    parts = [letter_losses(task.model, part) for part in windows.split(128)]
    return torch.cat(parts).mean().item()
