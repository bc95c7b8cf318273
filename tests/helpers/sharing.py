"""One problem on several processes: closures see a rank's part of every batch."""

import copy
import multiprocessing
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

SAMPLES, BATCH, STEPS = 12, 8, 20
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "sharing"])


def _enter(rank, world, folder, what, arguments):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        result = what(rank, world, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_processes(world, folder, what, *arguments, patience=120):
    """``what(rank, world, *arguments)`` of each rank; it must be a function of a helper module."""
    folder.mkdir(exist_ok=True)
    started = [
        SERVER.Process(target=_enter, args=(rank, world, folder, what, arguments))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(patience)
        if process.is_alive():
            for each in started:
                each.kill()
            raise AssertionError("a process waits for another")
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for result in results:
        assert not isinstance(result, str), result
    return results


class Network(nn.Module):
    """The lower level: a classifier, or the states of an equilibrium."""

    def __init__(self, is_map):
        super().__init__()
        if is_map:
            self.states = nn.Parameter(torch.linspace(-0.5, 0.5, 3))
        else:
            self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, weights=None):
        if weights is None:
            return self.out(torch.tanh(self.hidden(x)))
        mixing = torch.linspace(-0.3, 0.4, 9, dtype=x.dtype).reshape(3, 3)
        return torch.tanh(mixing @ self.states) + (weights[:, None] * x).mean(0)


class Shared:
    """A rank's view of the problem; of rank 0 of 1, the whole.

    u: a weight for each sample, and a decay. v: a small network, or a state.
    """

    def __init__(self, kind, engine, rank=0, world=1, *, wrapped=False, dtype=torch.float64):
        torch.manual_seed(0)
        self.rank, self.world, self.pure = rank, world, engine == "functional"
        self.is_map = kind == "fixed_point"
        x, noise = torch.randn(SAMPLES, 3), torch.randn(SAMPLES)
        self.x, self.y = x.to(dtype), (x.sum(1) + 0.5 * noise > 0).long()
        self.net = Network(self.is_map).to(dtype)
        self.model = DistributedDataParallel(self.net) if wrapped else self.net
        self.samples = torch.zeros(SAMPLES, dtype=dtype, requires_grad=True)
        self.decay = torch.tensor(-3.0, dtype=dtype, requires_grad=True)
        self.batch = slice(None)
        options = {"reduce": "mean"} if world > 1 else {}
        self.make = lambda: self._optimizer(kind, engine, options)
        self.optimizer = self.make()

    def _optimizer(self, kind, engine, options):
        upper, lower = [("samples", self.samples), ("decay", self.decay)], self.model
        # Adam would blow up the rounding of small differences.
        rule = torch.optim.SGD if kind == "value" else torch.optim.Adam
        upper = rule(upper, lr=0.5 if kind == "value" else 0.05)
        options = options | {"lower_lr": 0.02, "curvature": copy.deepcopy(engine)}
        if kind == "cg":
            optimizer = HypergradientOptimizer(
                upper,
                lower.named_parameters(),
                inner_iterations=4,
                lower_steps=2,
                damping=0.5,
                **options,
            )
        else:
            optimizer = PenaltyBilevelOptimizer(
                upper, lower.named_parameters(), penalty=kind, **options
            )
        optimizer.lower.register_step_pre_hook(self._clip)
        return optimizer

    def _clip(self, *_):
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.3)

    def draw(self, step):
        """This rank's part of the batch of a step."""
        source = torch.Generator().manual_seed(step)
        self.batch = torch.randperm(SAMPLES, generator=source)[:BATCH][self.rank :: self.world]

    def _read(self, upper, lower):
        if not self.pure:
            parameters = dict(self.model.named_parameters())
            return self.samples, self.decay, self.model, parameters
        model = lambda *given: torch.func.functional_call(self.model, lower, given)  # noqa: E731
        return upper["samples"], upper["decay"], model, lower

    def f(self, upper=None, lower=None):
        samples, decay, model, parameters = self._read(upper, lower)
        x, y = self.x[self.batch], self.y[self.batch]
        if self.is_map:
            gap = next(iter(parameters.values())) - x
            return gap.square().mean() + 0.1 * samples[self.batch].square().mean() + decay**2
        return nn.functional.cross_entropy(model(x), y)

    def g(self, upper=None, lower=None):
        samples, decay, model, parameters = self._read(upper, lower)
        x, y, weights = self.x[self.batch], self.y[self.batch], samples[self.batch].sigmoid()
        if self.is_map:
            return (model(x, weights * (decay + 4)),)
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        size = sum(p.square().sum() for p in parameters.values())
        return (weights * losses).mean() + decay.exp() * size

    def in_parts(self, loss, count):
        """The loss of this rank's batch, or of each of ``count`` micro-batches."""

        def of(rows):
            def part():
                whole, self.batch = self.batch, rows
                try:
                    return loss()
                finally:
                    self.batch = whole

            return part

        return loss if count == 1 else [of(rows) for rows in self.batch.chunk(count)]

    def run(self, steps=STEPS):
        """A scheduler, clipping, and a checkpoint in the middle; what came of it."""
        scheduler = StepLR(self.optimizer, 4, gamma=0.8)
        seen = []
        for step in range(steps):
            if step == steps // 2:
                saved, rates = self.optimizer.state_dict(), scheduler.state_dict()
                self.optimizer = self.make()
                self.optimizer.load_state_dict(saved)
                scheduler = StepLR(self.optimizer, 4, gamma=0.8)
                scheduler.load_state_dict(rates)
            self.draw(step)
            self.optimizer.step(self.f, self.g)
            scheduler.step()
            seen.append(list(self.optimizer.metrics.as_dict().values()))
        return {
            "upper": torch.cat([self.samples.detach(), self.decay.detach()[None]]),
            "lower": torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]),
            "adjoint": torch.cat([q.reshape(-1) for q in self.optimizer.adjoint]),
            "metrics": torch.tensor(seen).nan_to_num(-1.0),
        }


def runs(rank, world, cases):
    """What came of each (kind, engine, wrapped, dtype)."""
    return [Shared(k, e, rank, world, wrapped=w, dtype=d).run() for k, e, w, d in cases]


def plain_and_in_parts(rank, world, count):
    """Steps on g alone between the others, of ``count`` micro-batches on each rank."""
    shared = Shared("stationarity", "double_backward", rank, world)
    for step in range(STEPS):
        shared.draw(step)
        f, g = (shared.in_parts(loss, count) for loss in (shared.f, shared.g))
        if step % 2:
            shared.optimizer.plain_lower_step(g)
        else:
            shared.optimizer.step(f, g)
    return [shared.samples.detach(), *(p.detach() for p in shared.net.parameters())]
