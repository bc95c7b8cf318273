"""Accelerate's accumulation by micro-batches, its trackers and its checkpoints."""

import copy
import functools
import types

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from torch_penalty_bilevel import BilevelWarning, PenaltyBilevelOptimizer
from torch_penalty_bilevel.integrations import log_metrics

accelerate = pytest.importorskip("accelerate")
micro = pytest.importorskip("torch_penalty_bilevel.integrations.accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _accumulates_no_further():
    """Accelerate keeps its states from one ``Accelerator`` to the next."""
    yield
    accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Ridge(torch.nn.Module):
    """A linear model with dropout whose weight decay is the upper variable."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(3, 1))
        self.log_decay = torch.nn.Parameter(torch.zeros(()))

    def f(self, x, y):
        return mse_loss(self.model(x[:4]), y[:4])

    def g(self, x, y):
        decay = self.log_decay.exp() * self.model[1].weight.square().sum()
        return mse_loss(self.model(x[4:]), y[4:]) + decay

    def optimizer(self):
        levels = [self.log_decay], self.model.parameters()
        return PenaltyBilevelOptimizer(*levels, upper_lr=0.02, lower_lr=0.05)


def data(shuffle=False, rows=40):
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(rows, 3, generator=generator), torch.randn(rows, 1, generator=generator)
    return DataLoader(TensorDataset(X, y), batch_size=8, shuffle=shuffle)


def prepared(net, steps=1, shuffle=False):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    return accelerator, *accelerator.prepare(net, net.optimizer(), data(shuffle))


def same(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def closures(net, x, y):
    return functools.partial(net.f, x, y), functools.partial(net.g, x, y)


def test_an_accumulation_is_the_step_of_its_micro_batches():
    """Five batches by two: steps of 2, 2 and, at the end of the loader, 1; twice."""
    mine = Ridge()
    theirs = copy.deepcopy(mine)
    optimizer, expected = mine.optimizer(), []
    for _ in range(2):
        batches = list(data())
        for part in (batches[:2], batches[2:4], batches[4:]):
            both = [closures(mine, *batch) for batch in part]
            loss = optimizer.step([f for f, _ in both], [g for _, g in both])
            expected += [None] * (len(part) - 1) + [loss]

    accelerator, net, wrapped, loader = prepared(theirs, steps=2)
    waiting = micro.MicroBatches(accelerator, wrapped)
    found, counts = [], []
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(net):
                found.append(
                    waiting.step(lambda x=x, y=y: net.f(x, y), lambda x=x, y=y: net.g(x, y))
                )
            counts.append(len(waiting))
    assert counts == [1, 0, 1, 0, 0] * 2
    assert found == expected
    assert same(mine, theirs)


def test_closures_that_would_all_see_the_last_batch_are_refused():
    def late():
        for x, y in loader:
            with accelerator.accumulate(net):
                waiting.step(lambda: net.f(x, y), lambda: net.g(x, y))  # noqa: B023

    class Task:
        def lower(self):
            return net.g(*self.batch)

    def by_a_method():
        task = Task()
        for batch in loader:
            task.batch = batch
            with accelerator.accumulate(net):
                waiting.step(lambda: net.f(*batch), task.lower)  # noqa: B023

    accelerator, net, wrapped, loader = prepared(Ridge(), steps=2)
    before = copy.deepcopy(net)
    for loop in (late, by_a_method):
        waiting = micro.MicroBatches(accelerator, wrapped)
        with pytest.raises(ValueError, match=r"micro-batch 1 reads the variables .* lambda batch="):
            loop()
        assert same(before, net)


@pytest.mark.parametrize("place", ["nonlocal", "global"])
def test_an_upper_loss_that_would_see_a_later_batch_is_refused(place):
    """A loop in a function, and one of a script."""
    accelerator, net, wrapped, loader = prepared(Ridge(), steps=2)
    waiting = micro.MicroBatches(accelerator, wrapped)
    before = copy.deepcopy(net)
    lines = [
        "for x, y in loader:",
        "    with accelerator.accumulate(net):",
        "        waiting.step(lambda: net.f(x, y), lambda x=x, y=y: net.g(x, y))",
    ]
    if place == "nonlocal":
        lines = ["def loop():", *(f"    {line}" for line in lines), "loop()"]
    names = {"accelerator": accelerator, "net": net, "waiting": waiting, "loader": loader}
    with pytest.raises(ValueError, match=r"upper_closure of micro-batch 0 reads has changed"):
        exec("\n".join(lines), names)
    assert same(before, net)
    assert len(waiting) == 0


def test_one_upper_loss_may_serve_all_micro_batches():
    accelerator, net, wrapped, loader = prepared(Ridge(), steps=2)
    waiting = micro.MicroBatches(accelerator, wrapped)
    x, y = next(iter(data()))
    lines = [
        "for x, y in loader:  # not the x that is an attribute",
        "    with accelerator.accumulate(net):",
        "        f = lambda: net.f(trusted.x, trusted.y)",
        "        found.append(waiting.step(f, lambda x=x, y=y: net.g(x, y)))",
    ]
    names = {"accelerator": accelerator, "net": net, "waiting": waiting, "loader": loader}
    names |= {"trusted": types.SimpleNamespace(x=x, y=y), "found": []}
    exec("\n".join(lines), names)
    assert [each is None for each in names["found"]] == [True, False, True, False, False]


def test_steps_that_accelerate_leaves_out_are_named_once():
    """Between two steps of an accumulation nothing moves, and those batches are never seen."""
    accelerator, net, optimizer, loader = prepared(Ridge(), steps=2)
    moved = []

    def loop():
        for x, y in loader:
            before = copy.deepcopy(net)
            with accelerator.accumulate(net):
                optimizer.step(closures(net, x, y))
            moved.append(not same(before, net))

    with pytest.warns(BilevelWarning, match=r"one step of 2: .*MicroBatches") as caught:
        loop()
    assert moved == [False, True, False, True, True]
    assert len(caught) == 1


def test_no_warning_where_nothing_is_left_out():
    accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    net = Ridge()
    optimizer, (x, y) = net.optimizer(), next(iter(data()))
    f, g = closures(net, x, y)
    optimizer.step(f, g)  # not by Accelerate
    optimizer.step(([f], [g]))
    accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1)
    optimizer.step((f, g))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_its_checkpoints_go_on_bit_equally(tmp_path):
    """u, v, multiplier, moments, rates and random state: with shuffled data and dropout."""

    def run(net, epochs, load=False, save=False):
        torch.manual_seed(3)
        accelerator, net, optimizer, loader = prepared(net, shuffle=True)
        scheduler = accelerator.prepare(ExponentialLR(optimizer.optimizer, 0.9))
        if load:
            accelerator.load_state(str(tmp_path / "saved"))
        for _ in range(epochs):
            for x, y in loader:
                optimizer.step(closures(net, x, y))
            scheduler.step()
        if save:
            accelerator.save_state(str(tmp_path / "saved"))
        return optimizer.optimizer

    whole, first, later = Ridge(0.3), Ridge(0.3), Ridge(0.3)
    expected = run(whole, 4)
    run(first, 2, save=True)
    with torch.no_grad():
        for p in later.parameters():
            p.add_(1.0)
    found = run(later, 2, load=True)
    assert same(whole, later)
    assert not same(whole, first)
    assert all(map(torch.equal, expected.adjoint, found.adjoint))
    assert expected.metrics.as_dict() == found.metrics.as_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_trackers_get_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    net = Ridge()
    optimizer, (x, y) = net.optimizer(), next(iter(data()))
    expected = []
    for step in range(3):
        optimizer.step(*closures(net, x, y))
        written = log_metrics(optimizer.metrics, accelerator, step=step)
        expected.append(written["bilevel/relative_certificate"])
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    found = events.Scalars("bilevel/relative_certificate")
    assert [point.step for point in found] == [0, 1, 2]
    assert [point.value for point in found] == pytest.approx(expected, rel=1e-6)
