"""``BilevelTrainer`` with a small random GPT-2: beside a loop written by hand, and resumed."""

import itertools
import math

import pytest
import torch

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SourceWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*pin_memory.*"),
]

pytest.importorskip("transformers")
hugging_face = pytest.importorskip("hugging_face")
DIFFERENCES = hugging_face.DIFFERENCES
Rows = hugging_face.Rows
gpt2 = hugging_face.gpt2
upper_loss = hugging_face.upper_loss
lower_loss = hugging_face.lower_loss
Mixer = hugging_face.Mixer
trainer = hugging_face.trainer


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def everything(run):
    optimizer = run.optimizer.optimizer
    assert all(float(q.norm()) > 0 for q in optimizer.adjoint)
    return [*run.model.parameters(), *run.upper.parameters(), *optimizer.adjoint]


def same(one, other):
    return all(map(torch.equal, everything(one), everything(other)))


class Seen(Mixer):
    """Keeps the batches of both losses, each once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lower, self.clean = [], []

    def lower_groups(self, model):
        """In the order of Trainer, which moves norms by a unit of rounding."""
        decaying = self.get_decay_parameter_names(model)
        named = list(model.named_parameters())
        parts = ([p for n, p in named if (n in decaying) == first] for first in (True, False))
        return [{"params": part} for part in parts]

    def training_step(self, model, inputs, *rest):
        self.lower.append(dict(inputs))
        return super().training_step(model, inputs, *rest)

    def _next_upper_batch(self):
        self.clean.append(super()._next_upper_batch())
        return self.clean[-1]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_loop_written_by_hand(tmp_path, micro, every):
    """With its batches: rates of a linear schedule, clipping, micro-batches (the last alone)."""
    limit = 0.05
    run = trainer(
        tmp_path,
        Seen,
        model=gpt2(dropout=0.0),
        gradient_accumulation_steps=micro,
        num_train_epochs=2,
        max_grad_norm=limit,
        upper_every=every,
    )
    run.train()

    model, weights = gpt2(dropout=0.0), SourceWeights(2)
    model.train()
    groups = run.lower_groups(model)
    lower = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    optimizer = PenaltyBilevelOptimizer(weights.parameters(), lower, upper_lr=0.05, **DIFFERENCES)
    norms, losses, certificates, rates = [], [], [], []

    def clip(rule, *_):
        held = [p for group in rule.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.clip_grad_norm_(held, limit)))

    lower.register_step_pre_hook(clip)
    ends = [list(range(5))[i : i + micro] for i in range(0, 5, micro)]  # 18 rows by 4
    parts = [[run.lower[5 * epoch + i] for i in part] for epoch in range(2) for part in ends]
    clean = iter(run.clean)
    for step, part in enumerate(parts):
        for group, base in zip(optimizer.param_groups, (0.05, 0.01, 0.01), strict=True):
            group["lr"] = base * ((len(parts) - step) / len(parts))
        rates.append(optimizer.param_groups[1]["lr"])
        gs = [lambda b=batch: lower_loss(model, weights, b) for batch in part]
        if (step + 1) % every:
            losses.append(float(optimizer.plain_lower_step(gs)))
        else:
            fs = [lambda b=b: upper_loss(model, b) for b in itertools.islice(clean, len(part))]
            optimizer.step(fs, gs)
            losses.append(float(optimizer.metrics.lower_loss))
        certificates.append(float(optimizer.metrics.relative_certificate))
    assert next(clean, None) is None

    assert run.state.global_step == len(parts)
    for mine, theirs in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(weights.logits, run.upper.logits)
    assert float(weights.logits.detach().abs().max()) > 1e-3
    logs = [logs for logs in run.state.log_history if "loss" in logs]
    assert [each["loss"] for each in logs] == pytest.approx(losses, rel=1e-5)
    assert [each["grad_norm"] for each in logs] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > limit
    assert [each["learning_rate"] for each in logs] == pytest.approx(rates, rel=1e-6)
    found = [each.get("bilevel_relative_certificate", math.nan) for each in logs]
    assert found == pytest.approx(certificates, rel=1e-5, nan_ok=True)


class Masked:
    """A collator that draws, as those of masked language models do."""

    def __call__(self, rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        hidden = torch.rand(batch["input_ids"].shape) < 0.2
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 0)
        return batch


class WithMasks(Mixer):
    """Of f alone: Trainer does not replay what the collator of ``train_dataset`` draws."""

    def get_upper_dataloader(self):
        loader = super().get_upper_dataloader()
        loader.collate_fn = Masked()
        return loader


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_is_bit_equal(tmp_path, at):
    """Within an epoch of 3 steps, at its end, in the next; with dropout, masks, micro-batches."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 7, "save_steps": 1, "upper_every": 2}
    options |= {"save_strategy": "steps"}
    whole = trainer(tmp_path, WithMasks, **options)
    whole.train()
    torch.manual_seed(9)
    resumed = trainer(tmp_path, WithMasks, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert resumed.state.global_step == 7
    assert same(whole, resumed)
    mine, theirs = (run.state.log_history[:7] for run in (whole, resumed))
    for one, other in zip(mine, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert one[key] == other[key]
    # A plain step shows the metrics of the evaluation before it, which no checkpoint has.
    assert mine[at + 1 :] == theirs[at + 1 :]
    saved = torch.load(tmp_path / f"checkpoint-{at}" / "upper.pt", weights_only=True)
    assert saved["upper_batches"] == {2: 2, 3: 2, 4: 4}[at]


def test_the_source_that_helps_is_found(tmp_path):
    data, clean = Rows(256), Rows(64, sources=1, seed=1)
    run = trainer(tmp_path, data=data, clean=clean, max_steps=120, per_device_train_batch_size=16)
    run.train()
    assert float(run.upper()[0].detach()) > 0.75


def test_each_pass_over_the_upper_data_has_its_order(tmp_path):
    run = trainer(tmp_path, Seen, max_steps=6)
    run.train()
    rows = [tuple(row.tolist()) for batch in run.clean for row in batch["input_ids"]]
    passes = rows[:10], rows[10:20]
    expected = sorted(tuple(row.tolist()) for row in run.upper_dataset.tokens)
    assert [sorted(each) for each in passes] == [expected, expected]
    assert passes[0] != passes[1]


def test_the_best_checkpoint_brings_its_u(tmp_path):
    run = trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=Rows(2),
    )
    losses = [math.nan, 3.0, 1.0, 2.0, 4.0]
    run.evaluate = lambda *_, **__: {"eval_loss": losses[run.state.global_step]}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = torch.load(tmp_path / "checkpoint-2" / "upper.pt", weights_only=True)
    assert torch.equal(saved["upper"]["logits"], run.upper.logits)
    last = torch.load(tmp_path / "checkpoint-4" / "upper.pt", weights_only=True)
    assert not torch.equal(last["upper"]["logits"], run.upper.logits)
