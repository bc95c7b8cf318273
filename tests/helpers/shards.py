"""A lower level that ``fully_shard`` spreads over the processes."""

import torch
import torch.distributed.checkpoint as dcp
from sharing import SAMPLES, STEPS, Shared
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from torch_penalty_bilevel import (
    FiniteDifference,
    FixedPoint,
    HypergradientOptimizer,
    PenaltyBilevelOptimizer,
)
from torch_penalty_bilevel.constraints import Box

KINDS = ("stationarity", "value")


def whole(tensor):
    """All of a tensor."""
    held = tensor.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held.clone()


class Sharded(Shared):
    """The problem of ``Shared`` with an uneven network and its losses apart from its parameters."""

    def __init__(self, kind, rank=0, world=1, *, dtype=torch.float64, engine=None, **options):
        torch.manual_seed(0)
        self.rank, self.world = rank, world
        x, noise = torch.randn(SAMPLES, 3), torch.randn(SAMPLES)
        self.x, self.y = x.to(dtype), (x.sum(1) + 0.5 * noise > 0).long()
        self.both = nn.Module()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
        self.net.append(nn.Linear(3, 2))
        self.net.to(dtype)
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            fully_shard(self.net[2], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        self.both.net = self.net
        self.both.u = nn.Parameter(torch.zeros(SAMPLES, dtype=dtype))
        self.samples = self.both.u
        options = options | ({"reduce": "mean"} if world > 1 else {})
        engine = engine or FiniteDifference(3e-2 if dtype == torch.float32 else None)
        self.make = lambda: self._made(kind, engine, options)
        self.optimizer = self.make()

    def _made(self, kind, engine, options):
        rule = torch.optim.SGD if kind == "value" else torch.optim.Adam
        upper = rule([self.samples], lr=0.5 if kind == "value" else 0.05)
        lower = self.net.parameters()
        optimizer = PenaltyBilevelOptimizer(
            upper, lower, lower_lr=0.02, penalty=kind, curvature=engine, **options
        )
        optimizer.lower.register_step_pre_hook(self._clip)
        return optimizer

    def f(self):
        return nn.functional.cross_entropy(self.net(self.x[self.batch]), self.y[self.batch])

    def g(self):
        weights = self.samples[self.batch].sigmoid()
        outputs = self.net(self.x[self.batch])
        losses = nn.functional.cross_entropy(outputs, self.y[self.batch], reduction="none")
        return (weights * losses).mean() + 0.02 * outputs.square().mean()

    def steps(self, first, last):
        """From one step to before another; this object."""
        for step in range(first, last):
            self.draw(step)
            self.optimizer.step(self.f, self.g)
        return self

    def point(self):
        numbers = self.optimizer.metrics.as_dict()
        return {
            "upper": whole(self.samples),
            "lower": torch.cat([whole(p).reshape(-1) for p in self.net.parameters()]),
            "adjoint": torch.cat([whole(q).reshape(-1) for q in self.optimizer.adjoint]),
            "metrics": torch.tensor(list(numbers.values())).nan_to_num(-1.0),
        }


def sharded_runs(rank, world, cases):
    """What came of each (kind, dtype)."""
    return [Sharded(k, rank, world, dtype=d).steps(0, STEPS).point() for k, d in cases]


def tried(what):
    """The words of the error that ``what`` raises."""
    try:
        what()
    except ValueError as error:
        return str(error)
    return "fine"


def refusals(rank, world):
    """What shards cannot do, by the words of the error."""
    options = {"reduce": "mean", "lower_lr": 0.02}
    shard = Sharded("stationarity", rank, world)
    shard.draw(0)
    u, v = [shard.samples], list(shard.net.parameters())

    def said(upper=u, lower=v, **changed):
        return tried(lambda: PenaltyBilevelOptimizer(upper, lower, **options | changed))

    decayed = torch.optim.Adam(v, weight_decay=0.1)
    found = {
        "double_backward": said(curvature="double_backward"),
        "functional": said(curvature="functional"),
        "alone": said(reduce=None),
        "bound": said(lower_constraint=Box(-1, 1)),
        "decay": said(lower=decayed, lower_lr=None),
        "upper": said(upper=v, lower=u),
        "auto": said(),
        "map": said(penalty="fixed_point"),
        "map's object": said(penalty=FixedPoint(), curvature="finite_difference"),
        "map of cg": tried(lambda: cg_over(shard, lower_is_map=True, curvature="auto")),
        "check": tried(lambda: shard.optimizer.check_hypergradient(shard.f, shard.g)),
    }
    shard.samples.grad = torch.ones(SAMPLES)
    shard.optimizer.lower_step(shard.f, shard.g)
    found["upper gradient"] = shard.samples.grad.clone()
    return found


def cg_over(shard, **options):
    """Conjugate gradients over shards."""
    rules = {"lower_lr": 0.02, "upper_lr": 0.05, "curvature": FiniteDifference()} | options
    rules |= {"reduce": "mean"} if shard.world > 1 else {}
    return HypergradientOptimizer(
        [shard.samples], shard.net.parameters(), damping=0.5, inner_iterations=3, **rules
    )


def hypergradients(rank, world):
    """From warm starts."""
    shard = Sharded("stationarity", rank, world)
    shard.optimizer = cg_over(shard)
    return shard.steps(0, 6).point()


def moved_after_a_forward_pass(rank, world):
    """Shards that move while the module still holds what a pass without backward gathered."""
    found = {}
    shard = Sharded("stationarity", rank, world)
    shard.optimizer = cg_over(shard, warm_start=False, lower_steps=2)
    for step in range(3):
        shard.steps(step, step + 1)
        with torch.no_grad():  # a look at the validation loss; then v begins anew
            shard.f()
    found["begun anew"] = shard.point()

    shard = Sharded("stationarity", rank, world)
    shard.optimizer.lower_steps = 3
    shard.steps(0, 1)
    calls = []

    def fails_second():
        calls.append(shard.f())
        return calls[-1] if len(calls) < 2 else [][0]

    for _ in range(2):  # v is put back where it was, after a pass at where it had come to
        calls.clear()
        try:
            shard.optimizer.step(fails_second, shard.g)
        except IndexError:
            shard.steps(1, 2)
    found["put back"] = shard.point()
    return found


def saved(rank, world, folder, kind):
    """A checkpoint after six steps, and where six more lead."""
    shard = Sharded(kind, rank, world).steps(0, 6)
    model, optim = get_state_dict(shard.both, shard.optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)
    return shard.steps(6, 12).point()


def loaded(rank, world, folder, kind):
    """Six more steps from the checkpoint."""
    shard = Sharded(kind, rank, world)
    model, optim = get_state_dict(shard.both, shard.optimizer)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=folder)
    set_state_dict(shard.both, shard.optimizer, model_state_dict=model, optim_state_dict=optim)
    return shard.steps(6, 12).point()


def two(rank, world, cases, folder):
    """All that two processes are asked."""
    return {
        "runs": sharded_runs(rank, world, cases),
        "refusals": refusals(rank, world),
        "cg": hypergradients(rank, world),
        "saved": {kind: saved(rank, world, folder / kind, kind) for kind in KINDS},
    }


def four(rank, world, folder):
    """What four make of the checkpoint of two."""
    return {kind: loaded(rank, world, folder / kind, kind) for kind in KINDS}
