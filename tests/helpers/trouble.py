"""What goes wrong on one process only, and what all of them say to it."""

import warnings

import torch
import torch.distributed as dist
from sharing import BATCH, Shared
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_penalty_bilevel import FiniteDifference, PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Box, Inequality


def outcome(act):
    """The kind of what ``act`` raised, and its first words."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return "fine", ""


def everything(shared):
    """What a failed step must leave alone, as one vector."""
    numbers = [shared.samples, shared.decay, *shared.net.parameters(), *shared.optimizer.adjoint]
    return torch.cat([t.detach().reshape(-1) for t in numbers])


class Failing:
    """A loss whose ``number``-th call raises, or returns what ``instead`` makes of it."""

    def __init__(self, loss, number, instead=None):
        self.loss, self.left, self.instead = loss, number, instead

    def __call__(self, *point):
        self.left -= 1
        value = self.loss(*point)
        if self.left != 0:
            return value
        if self.instead is None:
            raise ZeroDivisionError("of this rank alone")
        return self.instead(value)


def raised_calls(rank, world):
    """Of every kind of step, f or g raises at its n-th call, of rank 1 only."""
    found = {}
    kinds = [("stationarity", "double_backward"), ("stationarity", "finite_difference")]
    kinds += [("stationarity", "functional"), ("value", "auto"), ("fixed_point", "auto")]
    kinds += [("cg", "auto"), ("paper", "auto")]
    for kind, engine in kinds:
        for level in (0, 1):
            for number in range(1, 6):
                shared = Shared(kind, engine, rank, world)
                before = everything(shared)
                losses = [shared.f, shared.g]
                if rank == 1:
                    losses[level] = Failing(losses[level], number)
                shared.draw(0)
                kinds_of_error, unchanged = [], True
                for step in (1, 2):
                    said = outcome(lambda s=shared, pair=tuple(losses): s.optimizer.step(*pair))[0]
                    if said != "fine" and step == 1:
                        unchanged = torch.equal(everything(shared), before)
                    kinds_of_error.append(said)
                after = outcome(lambda s=shared: s.optimizer.step(s.f, s.g))[0]
                found[kind, engine, level, number] = (
                    kinds_of_error,
                    unchanged,
                    after,
                    everything(shared),
                )
    return found


def other_troubles(rank, world):
    """Name: what this rank saw."""
    found = {}
    shared = Shared("stationarity", "auto", rank, world)
    infinite = Failing(shared.f, 1 if rank == 1 else 99, lambda value: value * torch.inf)
    found["infinite"] = outcome(lambda: shared.optimizer.step(infinite, shared.g))

    shared = Shared("stationarity", FiniteDifference(), rank, world)
    drawn = Failing(shared.g, 2, lambda value: 3 * value) if rank == 1 else shared.g
    found["other data"] = outcome(lambda: shared.optimizer.step(shared.f, drawn))

    for name, allowed in (("unused", False), ("unused, allowed", True)):
        extra = torch.ones(2, requires_grad=True)
        shared = Shared("stationarity", "auto", rank, world)
        upper = [shared.samples, shared.decay, extra]
        optimizer = PenaltyBilevelOptimizer(
            upper, shared.net.parameters(), reduce="mean", allow_unused=allowed
        )
        shared.optimizer = optimizer
        found[name] = outcome(lambda o=optimizer, s=shared: o.step(s.f, s.g))
        found[f"{name}: grad"] = extra.grad
    found["on one rank"] = on_one_rank(rank)
    shared = Shared("stationarity", "auto", rank, world)
    shared.samples.data += 0.1 * rank
    found["other start"] = outcome(lambda: shared.optimizer.step(shared.f, shared.g))

    shared = Shared("stationarity", "auto", rank, world)
    hidden = Hidden.apply if rank == 1 else lambda x: x
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shared.optimizer.step(shared.f, lambda: hidden(shared.g()))
    found["engine"] = shared.optimizer.curvature.takes_differences
    found["engine says"] = [str(w.message) for w in said]

    sent, plain = [], dist.all_reduce
    dist.all_reduce = lambda flat, **options: (sent.append(flat.numel()), plain(flat, **options))
    shared = Shared("stationarity", "double_backward", rank, world)
    for step in range(14):
        shared.draw(step)
        sent.clear()
        shared.optimizer.step(shared.f, shared.g)
    dist.all_reduce = plain
    found["sent"] = list(sent)
    found["numbers"] = sum(p.numel() for p in shared.net.parameters())
    return found


class Hidden(torch.autograd.Function):
    """The identity, of whose second derivative nobody knows anything."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def on_one_rank(rank, world=2):
    """``extra`` is used by rank 0 alone, and so in half of the mean; ``rank`` None: the mean."""
    extra = torch.ones(2, requires_grad=True)
    shared = Shared("stationarity", "double_backward", rank or 0, 1 if rank is None else world)
    optimizer = PenaltyBilevelOptimizer(
        [shared.samples, shared.decay, extra],
        shared.net.parameters(),
        reduce=None if rank is None else "mean",
    )
    share = {None: 0.5, 0: 1.0, 1: 0.0}[rank]

    def f():
        return shared.f() + (share * (extra**2).sum() if share else 0.0)

    for step in range(3):
        shared.draw(step)
        optimizer.step(f, shared.g)
    return extra.detach().clone()


def decisions(rank, world):
    """Steps that choose how many they are, checks, constraints: what all ranks must see alike."""
    found = {}
    shared = Shared("stationarity", "double_backward", rank, world)
    options = {"reduce": "mean"} if world > 1 else {}
    u, v = [shared.samples, shared.decay], list(shared.net.parameters())
    waiting = PenaltyBilevelOptimizer(
        u, v, lower_steps="auto", max_lower_steps=30, warmup_steps=3, lower_lr=0.05, **options
    )
    for step in range(4):
        shared.draw(step)
        waiting.step(shared.f, shared.g)
        if step == 2:
            waiting.restart_lower()
    found["waiting"] = torch.tensor(list(waiting.metrics.as_dict().values())).nan_to_num(0.0)
    found["waiting: u"] = shared.samples.detach().clone()

    shared = Shared("stationarity", "auto", rank, world)
    for _ in range(30):
        shared.draw(0)
        shared.optimizer.step(shared.f, shared.g)
    report = shared.optimizer.check_hypergradient(shared.f, shared.g, damping=0.5, resolve=True)
    found["report"] = torch.tensor(
        [report.relative_error, report.cosine, report.residual_norm, report.adjoint_residual_norm]
        + [slope.resolved for slope in report.slopes]
    )

    shared = Shared("stationarity", "auto", rank, world)
    bounded = PenaltyBilevelOptimizer(
        [shared.samples, shared.decay],
        list(shared.net.parameters()),
        upper_constraint=[Box(-4, 1), Inequality(lambda: shared.decay + 3.1)],
        lower_constraint=Inequality(lambda: shared.net.out.bias - 0.05),
        upper_lr=0.05,
        lower_lr=0.05,
        **options,
    )
    for step in range(6):
        shared.draw(step)
        bounded.step(shared.f, shared.g)
    held = [t for level in bounded.inequality_multipliers.values() for t in level]
    numbers = [*shared.net.parameters(), shared.samples, *held, bounded.metrics.upper_loss]
    found["bounded"] = torch.cat([t.detach().reshape(-1) for t in numbers])
    return found


def with_statistics(rank, world):
    """BatchNorm behind DDP in ordinary training between steps; one rank's closure raises."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = DistributedDataParallel(net, find_unused_parameters=True)
    x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(rank))
    weights = torch.zeros(BATCH, requires_grad=True)
    optimizer = PenaltyBilevelOptimizer([weights], model.parameters(), reduce="mean")

    def f():
        return model(x).square().mean()

    def g():
        return (weights.sigmoid() * (model(x)[:, 0] - x.sum(1)).square()).mean()

    plain = torch.optim.SGD(model.parameters(), lr=0.01)
    said = []
    for step in range(4):
        lower = Failing(g, 1) if step == 2 and rank == 1 else g
        said.append(outcome(lambda pair=(f, lower): optimizer.step(*pair))[0])
        plain.zero_grad()
        (model(x) - 1).square().mean().backward()
        plain.step()
    flags = model.require_backward_grad_sync, model.find_unused_parameters
    return {
        "said": said,
        "flags": flags,
        "engine": optimizer.curvature.reason,
        "lower": torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
        "batches": int(net[1].num_batches_tracked),
    }


def strangers(rank, world):
    """Warnings of steps without ``reduce``, and with one that says that it is meant."""
    heard = []
    for reduce in (None, lambda tensors: tensors):
        shared = Shared("stationarity", "double_backward", rank, 1)
        optimizer = PenaltyBilevelOptimizer(
            [shared.samples, shared.decay], shared.net.parameters(), reduce=reduce
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step(shared.f, shared.g)
        heard.append([(w.category.__name__, str(w.message), w.filename) for w in said])
    own = dist.new_group([rank], use_local_synchronization=True)
    alone = Shared("stationarity", "double_backward", 0, 1)
    optimizer = PenaltyBilevelOptimizer(
        [alone.samples, alone.decay], alone.net.parameters(), reduce="mean", process_group=own
    )
    alone.draw(rank)  # other batches, which nobody averages
    optimizer.step(alone.f, alone.g)
    single = Shared("stationarity", "double_backward", 0, 1)
    single.draw(rank)
    lonely = PenaltyBilevelOptimizer(
        [single.samples, single.decay], single.net.parameters(), reduce=lambda tensors: tensors
    )
    lonely.step(single.f, single.g)
    return heard, torch.equal(alone.samples, single.samples)


def all_of_them(rank, world):
    """By name, what each function of this module returns."""
    tried = raised_calls, other_troubles, decisions, with_statistics, strangers
    return {each.__name__: each(rank, world) for each in tried}
