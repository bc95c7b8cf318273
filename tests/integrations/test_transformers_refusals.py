"""What ``BilevelTrainer`` refuses, and how it says so."""

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*pin_memory.*"),
]

pytest.importorskip("transformers")
hugging_face = pytest.importorskip("hugging_face")
Rows = hugging_face.Rows
gpt2 = hugging_face.gpt2
upper_loss = hugging_face.upper_loss
trainer = hugging_face.trainer
BilevelTrainer = hugging_face.BilevelTrainer


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def test_trainer_s_own_checkpoint_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "checkpoint-1" / "upper.pt").unlink()
    with pytest.raises(ValueError, match=r"has no upper.pt, so it is not of a BilevelTrainer"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, r"fp16=True; use bf16=True"),
        ({"model_init": lambda: gpt2()}, r"model_init; use model="),
        ({"optimizers": "SGD"}, r"optimizers has SGD; leave it out"),
        ({"optim": "schedule_free_adamw"}, r"optim='schedule_free_adamw'; use a rule whose step"),
        ({"optim": "adalomo"}, r"optim='adalomo'; use a rule whose step"),
        ({"optim": "galore_adamw_layerwise"}, r"optim='galore_adamw_layerwise'; use a rule"),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True; use a per_device_train"),
        ({"upper_every": 0}, r"upper_every must be an integer >= 1, got 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path, options, message):
    if "optimizers" in options:
        model = gpt2()
        options = {"model": model, "optimizers": (sgd(model), None)}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_weight_decay_that_is_not_in_g_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"AdamW.*weight_decay"):
        trainer(tmp_path, weight_decay=0.1, max_steps=1).train()


def test_levels_that_are_none_are_named(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError

    with pytest.raises(TypeError, match="upper is Tensor; give a module whose parameters are u"):
        trainer(tmp_path, upper=torch.zeros(2, 2))
    with pytest.raises(TypeError, match="upper_dataset is Stream, which has no length"):
        trainer(tmp_path, clean=Stream())


def test_a_lower_loss_has_to_be_written(tmp_path):
    with pytest.raises(NotImplementedError, match="write compute_lower_loss"):
        trainer(tmp_path, BilevelTrainer, max_steps=1, remove_unused_columns=True).train()


def test_the_default_upper_loss_is_the_model_s(tmp_path):
    run, batch = trainer(tmp_path, BilevelTrainer), Rows(4)[:2]
    inputs = {key: batch[key] for key in ("input_ids", "labels")}
    run.model.eval()
    assert torch.equal(run.compute_upper_loss(run.model, inputs), upper_loss(run.model, inputs))


def test_a_scheduler_of_another_optimizer_is_refused(tmp_path):
    model = gpt2()
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd(model))
    with pytest.raises(ValueError, match=r"optimizers has ConstantLR; .* lr_scheduler_type"):
        trainer(tmp_path, model=model, optimizers=(None, schedule))


def test_an_upper_dataset_without_rows_is_named(tmp_path):
    class Nothing(Rows):
        def __len__(self):
            return 0

        def __bool__(self):
            return True

    with pytest.raises(ValueError, match="upper_dataset is empty"):
        trainer(tmp_path, clean=Nothing(1))


def test_what_is_logged_before_the_training_has_no_metrics(tmp_path):
    run = trainer(tmp_path)
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["loss"] == 1.0
    assert not any(key.startswith("bilevel_") for key in run.state.log_history[-1])
