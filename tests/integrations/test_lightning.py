"""Lightning's log, progress bar and checkpoints, with the real trainer."""

import random

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torch_penalty_bilevel import HypergradientOptimizer, PenaltyBilevelOptimizer

pytestmark = [
    # Theirs, about their own parts, loaders without workers and the optimizers of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

L = pytest.importorskip("lightning")
BilevelCallback = pytest.importorskip(
    "torch_penalty_bilevel.integrations.lightning"
).BilevelCallback


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)  # of Lightning's "32-true"


class Ridge(L.LightningModule):
    """A linear model with dropout whose weight decay is the upper variable."""

    def __init__(self, kind=PenaltyBilevelOptimizer, noise=False, **options):
        super().__init__()
        self.automatic_optimization = False
        self.model = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(3, 1))
        self.log_decay = torch.nn.Parameter(torch.zeros(()))
        self.kind, self.noise, self.options, self.seen = kind, noise, options, []

    def configure_optimizers(self):
        levels = [self.log_decay], self.model.parameters()
        return self.kind(*levels, upper_lr=0.02, lower_lr=0.05, **self.options)

    def training_step(self, batch, _):
        x, y = batch
        if self.noise:  # of Python and NumPy
            x = x + random.random() + np.random.rand()

        def f():
            return mse_loss(self.model(x[:4]), y[:4])

        def g():
            decay = self.log_decay.exp() * self.model[1].weight.square().sum()
            return mse_loss(self.model(x[4:]), y[4:]) + decay

        optimizer = self.optimizers()
        optimizer.step(closure=f, lower_closure=g)
        self.seen.append(optimizer.optimizer.metrics.as_dict())


def data():
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(32, 3, generator=generator), torch.randn(32, 1, generator=generator)
    return DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)


def trainer(folder, callbacks, **options):
    options = {"enable_progress_bar": False, "logger": False} | options
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_model_summary=False,
        **options,
    )


def fit(folder, module, epochs, path=None):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if path is not None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    whole = trainer(folder, [BilevelCallback(), saving], max_epochs=epochs)
    whole.fit(module, data(), ckpt_path=path, weights_only=True)
    return whole


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_a_checkpoint_goes_on_bit_equally(tmp_path, kind):
    """From ModelCheckpoint's file after one epoch of three: all, with shuffled data and noise."""
    options = {} if kind is PenaltyBilevelOptimizer else {"damping": 1.0}
    torch.manual_seed(0)
    whole, resumed = Ridge(kind, noise=True, **options), Ridge(kind, noise=True, **options)
    expected = fit(tmp_path / "whole", whole, 3)
    found = fit(tmp_path / "resumed", resumed, 3, tmp_path / "whole" / "epoch=0.ckpt")
    assert found.global_step == expected.global_step == 12
    assert repr(resumed.seen) == repr(whole.seen[4:])  # NaN included
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    (one,), (other,) = expected.optimizers, found.optimizers
    assert all(map(torch.equal, one.adjoint, other.adjoint))
    assert all(float(q.norm()) > 0 for q in one.adjoint)
    for parameter, later in zip(whole.parameters(), resumed.parameters(), strict=True):
        mine, theirs = one.state[parameter], other.state[later]
        assert mine.keys() == theirs.keys() >= {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)


def test_max_steps_counts_bilevel_steps(tmp_path):
    module = Ridge()
    run = trainer(tmp_path, [BilevelCallback()], max_steps=6, enable_checkpointing=False)
    run.fit(module, data())
    assert run.global_step == len(module.seen) == 6


def test_the_wrapper_passes_micro_batches_of_g_on(tmp_path):
    """And refuses those of f, which it wants to call."""

    class Parts(Ridge):
        def training_step(self, batch, number):
            x, y = batch
            wrapper = self.optimizers()
            optimizer = wrapper if self.wrapped else wrapper.optimizer

            def part(rows):
                decay = self.log_decay.exp() * self.model[1].weight.square().sum()
                return mse_loss(self.model(x[rows]), y[rows]) + decay

            gs = [lambda: part(slice(2, 5)), lambda: part(slice(5, 8))]
            optimizer.step(closure=lambda: part(slice(0, 2)), lower_closure=gs)
            if self.wrapped and number == 3:
                with pytest.raises(Exception, match="closure should be callable"):
                    wrapper.step(closure=gs, lower_closure=gs)

    torch.manual_seed(0)
    one, other = Parts(), Parts()
    other.load_state_dict(one.state_dict())
    for module, wrapped in ((one, True), (other, False)):
        module.wrapped = wrapped
        torch.manual_seed(1)
        options = {"max_epochs": 1, "enable_checkpointing": False}
        trainer(tmp_path, [BilevelCallback()], **options).fit(module, data())
    assert all(map(torch.equal, one.parameters(), other.parameters()))


class Keeps(L.pytorch.callbacks.TQDMProgressBar):
    """What the progress bar showed, batch by batch."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.shown.append(self.get_metrics(trainer, pl_module))


def test_logger_and_progress_bar_show_the_certificate(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="run", version=0)
    module, bar = Ridge(), Keeps()
    run = trainer(
        tmp_path,
        [BilevelCallback(), bar],
        max_epochs=2,
        logger=logger,
        log_every_n_steps=2,
        enable_progress_bar=True,
        enable_checkpointing=False,
    )
    run.fit(module, data())
    assert "bilevel/relative_certificate=" in capsys.readouterr().out
    certificates = [seen["relative_certificate"] for seen in module.seen]
    name = "bilevel/relative_certificate"
    assert [shown[name] for shown in bar.shown] == pytest.approx(certificates, rel=1e-6)
    assert not any("bilevel/residual_norm" in shown for shown in bar.shown)
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    for key in ("relative_certificate", "residual_norm", "gradient_evaluations"):
        points = events.Scalars(f"bilevel/{key}")
        assert [point.step for point in points] == [1, 3, 5, 7]
        expected = [seen[key] for seen in module.seen[1::2]]
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_that_lightning_does_not_know_is_refused(tmp_path):
    """Its multiplier would not be in the checkpoints."""

    class Apart(Ridge):
        def configure_optimizers(self):
            self.bilevel = super().configure_optimizers()
            return [self.bilevel.upper, self.bilevel.lower]

    run = trainer(tmp_path, [BilevelCallback()], max_epochs=1)
    with pytest.raises(ValueError, match="returned Adam, Adam; return the PenaltyBilevelOptimizer"):
        run.fit(Apart(), data())


def test_a_metric_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"prog_bar names \['certificate'\], which Metrics"):
        BilevelCallback(prog_bar=("certificate",))
