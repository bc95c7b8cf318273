"""Lightning's and Accelerate's wrappers reach ``step``: every value is that of the plain loop."""

import copy

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from torch_penalty_bilevel import PenaltyBilevelOptimizer

pytestmark = [
    # Theirs, about their own parts, loaders without workers and the optimizers of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Ridge(torch.nn.Module):
    """A linear model whose weight decay is the upper variable."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(3, 1)
        self.log_decay = torch.nn.Parameter(torch.zeros(()))

    def closures(self, batch):
        x, y = batch
        return (
            lambda: mse_loss(self.model(x[:8]), y[:8]),
            lambda: (
                mse_loss(self.model(x[8:]), y[8:])
                + self.log_decay.exp() * self.model.weight.square().sum()
            ),
        )

    def optimizer(self):
        return PenaltyBilevelOptimizer(
            [self.log_decay], self.model.parameters(), upper_lr=0.02, lower_lr=0.05
        )


def data():
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(64, 3, generator=generator), torch.randn(64, 1, generator=generator)
    return DataLoader(TensorDataset(X, y), batch_size=16)


def plain(net, epochs):
    """The loop that users write by themselves."""
    optimizer, losses = net.optimizer(), []
    scheduler = ExponentialLR(optimizer, 0.9)
    for _ in range(epochs):
        losses += [optimizer.step(*net.closures(batch)) for batch in data()]
        scheduler.step()
    return losses


def same(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def lightning_module(L, net):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net, self.losses = net, []

        def configure_optimizers(self):
            optimizer = self.net.optimizer()
            return [optimizer], [ExponentialLR(optimizer, 0.9)]

        def training_step(self, batch, _):
            f, g = self.net.closures(batch)
            self.losses.append(self.optimizers().step(closure=f, lower_closure=g))

        def on_train_epoch_end(self):
            self.lr_schedulers().step()

    return Module()


def test_lightning(tmp_path):
    L = pytest.importorskip("lightning")
    torch.set_default_dtype(torch.float32)  # of Lightning's "32-true"

    def trainer(epochs):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **quiet,
        )

    mine = Ridge()
    theirs, later = copy.deepcopy(mine), copy.deepcopy(mine)
    losses = plain(mine, 3)
    module = lightning_module(L, theirs)
    whole = trainer(3)
    whole.fit(module, data())
    assert whole.global_step == 12  # Lightning counts our steps
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    assert same(mine, theirs)

    # Its checkpoints go on bit-equally.
    first = trainer(1)
    first.fit(lightning_module(L, later), data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = lightning_module(L, Ridge())
    trainer(3).fit(resumed, data(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert same(mine, resumed.net)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    mine = Ridge()
    theirs = copy.deepcopy(mine)
    plain(mine, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = theirs.optimizer()
    prepared = accelerator.prepare(theirs, optimizer, ExponentialLR(optimizer, 0.9), data())
    net, wrapped, scheduler, loader = prepared
    assert isinstance(wrapped, accelerate.optimizer.AcceleratedOptimizer)
    for _ in range(2):
        for batch in loader:
            wrapped.step(net.closures(batch))
        scheduler.step()
    assert same(mine, theirs)
    assert optimizer.metrics.gradient_evaluations > 0
