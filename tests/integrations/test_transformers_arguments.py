"""Arguments of ``Trainer`` mean to ``BilevelTrainer`` what they mean to it."""

import pytest
import torch
import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*pin_memory.*"),
]

hugging_face = pytest.importorskip("hugging_face")
Mixer = hugging_face.Mixer
trainer = hugging_face.trainer


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_of_nothing_or_less_does_not_clip(tmp_path, limit):
    """A negative one would turn the direction of v around."""

    def trained(most):
        run = trainer(tmp_path, max_steps=2, max_grad_norm=most)
        run.train()
        return run.model.parameters()

    assert all(map(torch.equal, trained(1e9), trained(limit)))


@pytest.mark.parametrize(
    ("schedule", "options", "end"),
    [
        ("cosine_with_min_lr", {"min_lr": 0.001}, 0.001),
        ("polynomial", {"lr_end": 0.002}, 0.002),
    ],
)
def test_the_rate_at_the_end_is_that_of_v(tmp_path, schedule, options, end):
    """v's goes from 0.01 to it; u's, 0.05, by the same share."""
    run = trainer(tmp_path, max_steps=3, lr_scheduler_type=schedule, lr_scheduler_kwargs=options)
    run.train()
    rates = {group["level"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates["lower"] == pytest.approx(end, rel=1e-6)
    assert rates["upper"] == pytest.approx(0.05 * end / 0.01, rel=1e-6)


def test_micro_batches_of_a_run_that_was_cut_are_not_of_the_next(tmp_path):
    class Cut(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **rest):
            raise KeyboardInterrupt

    class Counting(Mixer):
        steps = ()

        def training_step(self, model, inputs, *rest):
            loss = super().training_step(model, inputs, *rest)
            self.steps += (len(self._waiting),)
            return loss

    run = trainer(tmp_path, Counting, max_steps=1, gradient_accumulation_steps=3)
    run.add_callback(Cut)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Cut)
    run.train()
    assert run.steps == (1, 1, 2, 0)
