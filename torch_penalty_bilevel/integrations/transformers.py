"""Hugging Face's ``Trainer`` with an upper level."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..arguments import check_count
from ..optimizers.penalty import PenaltyBilevelOptimizer
from .logs import log_metrics

try:
    from accelerate import skip_first_batches
    from transformers import Trainer
except ImportError as error:
    from .missing import missing

    raise missing("transformers") from error

_FILE = "upper.pt"


class BilevelTrainer(Trainer):
    r"""A ``Trainer`` that learns u on ``upper_dataset`` while it trains the model, v.

    .. math:: \min_u f(u, v), \qquad v \text{ minimises } g(u, \cdot)

    f is the mean of ``compute_upper_loss`` over ``upper_dataset``, by default the model's own loss.
    g is the mean of ``compute_lower_loss`` over ``train_dataset``: write it in a subclass::

        class Mixer(BilevelTrainer):
            def compute_lower_loss(self, model, inputs):
                source = inputs.pop("source")  # which each text of the batch is from
                return self.upper(source) @ losses(model, inputs)

        trainer = Mixer(
            model, args, train_dataset=train, upper=weights, upper_dataset=clean, upper_lr=0.1,
            optimizer_options={"curvature": "finite_difference"},
        )  # remove_unused_columns=False in args, or "source" is gone
        trainer.train(resume_from_checkpoint=True)

    v's rule is the one that ``args`` ask for, with ``weight_decay=0`` (decay that is not part of g
    is refused); a scheduler scales the rates of both levels, a rate that it ends at is of v.
    ``max_grad_norm`` clips the direction of v (0 or less does not), ``grad_norm`` is its norm
    before that. ``label_smoothing_factor`` and ``compute_loss_func`` reach ``compute_loss``: f as
    it comes, and g only where it calls that. ``gradient_accumulation_steps`` are micro-batches
    that count alike, however many tokens they have. The log has g as ``loss``, v's rate as
    ``learning_rate`` and the optimizer's ``metrics`` as ``bilevel_...``. Checkpoints have
    ``upper.pt`` beside the model: u and the place in ``upper_dataset``; a resumed run is bit-equal
    (where a plain ``Trainer``'s is: what the collator of ``train_dataset`` draws is not replayed
    within an epoch). Several processes share the problem (``reduce="mean"``).

    Args:
        args: as for ``Trainer``, by position or name, as are all others but those below.
        upper: a module with u.
        upper_dataset: of f, with a length; batches have ``per_device_train_batch_size`` rows, in an
            order of their own (see ``get_upper_dataloader``).
        upper_lr: learning rate of u.
        upper_every: u moves with every so many steps; those between are ``plain_lower_step``, as
            cheap as plain training.
        optimizer_options: others of ``PenaltyBilevelOptimizer``, such as ``curvature``.

    Raises:
        ValueError: what the bilevel step does not go with: ``fp16`` (use ``bf16``), weight decay,
            ``model_init``, ``auto_find_batch_size``, rules for v that work in backward or in
            ``train()`` and ``eval()`` (LOMO, layerwise, schedule-free), anything in
            ``optimizers``, DataParallel, DeepSpeed, FSDP; an empty ``upper_dataset``; a checkpoint
            without ``upper.pt``.
        TypeError: ``upper`` is no module, or ``upper_dataset`` has no length.
        NotImplementedError: ``compute_lower_loss`` was not written.
    """

    def __init__(
        self,
        *args: Any,
        upper: nn.Module,
        upper_dataset: Dataset[Any],
        upper_lr: float = 1e-3,
        upper_every: int = 1,
        optimizer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given: Any = upper
        rows: Any = upper_dataset
        if not isinstance(given, nn.Module):
            raise TypeError(
                f"upper is {type(given).__name__}; give a module whose parameters are u, such as "
                "torch_penalty_bilevel.nn.SourceWeights(3)"
            )
        if not hasattr(rows, "__len__"):
            raise TypeError(
                f"upper_dataset is {type(rows).__name__}, which has no length, so that a "
                "resumed run could not find its place; give a dataset with one"
            )
        if len(rows) == 0:
            raise ValueError("upper_dataset is empty, so that there is no f; give it rows")
        check_count("upper_every", upper_every, at_least=1)
        super().__init__(*args, **kwargs)
        self._refuse()
        self.upper = upper.to(self.args.device)
        self.upper_dataset, self.upper_lr, self.upper_every = upper_dataset, upper_lr, upper_every
        self.optimizer_options = dict(optimizer_options or {})
        self._waiting: list[Callable[[], Tensor]] = []
        self._upper_batches = 0
        self._upper_iterator: Iterator[Any] | None = None
        self._direction_norm = math.nan

    def _refuse(self) -> None:
        rule = str(getattr(self.args.optim, "value", self.args.optim))
        unserved = {
            # Rules that move v in train(), in eval() or in backward, none of which is called here.
            f"optim={rule!r}": (
                rule.startswith(("schedule_free", "lomo", "adalomo")) or rule.endswith("layerwise"),
                "a rule whose step alone moves v, such as 'adamw_torch'",
            ),
            "fp16=True": (self.args.fp16, "bf16=True, which needs no GradScaler"),
            "model_init": (self.model_init is not None, "model=..., since u is made only once"),
            "auto_find_batch_size=True": (  # it begins anew, with the u and v of the failed try
                self.args.auto_find_batch_size,
                "a per_device_train_batch_size that fits, of both losses",
            ),
            "several GPUs in one process": (self.args.n_gpu > 1, "torchrun, one process per GPU"),
            "DeepSpeed": (self.is_deepspeed_enabled, "torchrun with plain DDP"),
            "FSDP": (self.is_fsdp_enabled, "torchrun with plain DDP, or a loop of your own"),
        }
        for what, (is_given, remedy) in unserved.items():
            if is_given:
                raise ValueError(f"BilevelTrainer does not go with {what}; use {remedy}")
        # A scheduler would move the rates of an optimizer that is not used.
        given: list[Any] = [self.optimizer, self.lr_scheduler]
        for each in filter(None, given):
            raise ValueError(
                f"optimizers has {type(each).__name__}; leave it out, and give options of "
                "PenaltyBilevelOptimizer in optimizer_options; v's rule is chosen by "
                "args.optim, or by optimizer_cls_and_kwargs, the schedule by lr_scheduler_type"
            )

    # The losses.

    def compute_upper_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The upper loss f on a batch of ``upper_dataset``, 0-d."""
        loss: Any = self.compute_loss(model, inputs)
        return loss

    def compute_lower_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The lower loss g on a batch of ``train_dataset``, 0-d; reads ``self.upper``."""
        raise NotImplementedError(
            "write compute_lower_loss(self, model, inputs) in a subclass of BilevelTrainer: g on a "
            "batch, which reads self.upper"
        )

    # The step.

    def create_optimizer(self, model: Any = None) -> Any:
        """The bilevel optimizer around the rule for v that ``Trainer`` would train with."""
        self._waiting.clear()  # of a run that was cut within an accumulation
        made: Any = self.optimizer
        if made is None:
            lower = super().create_optimizer(*(() if model is None else (model,)))
            options: dict[str, Any] = {"reduce": "mean"} if self.args.world_size > 1 else {}
            optimizer = PenaltyBilevelOptimizer(
                list(self.upper.named_parameters()),
                lower,
                upper_lr=self.upper_lr,
                **(options | self.optimizer_options),
            )
            # Schedules that end at a rate take it as a share of this one.
            of_v = lower.defaults.get("lr", self.args.learning_rate)
            optimizer.defaults = optimizer.defaults | {"lr": of_v}
            lower.register_step_pre_hook(self._clip)
            _leave_out_bare_steps(optimizer)
            self.optimizer = made = optimizer
        return made

    def _clip(self, rule: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        held = [p for group in rule.param_groups for p in group["params"]]
        self._direction_norm = nn.utils.clip_grad_norm_(held, limit)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._direction_norm  # Trainer has taken that of what is clipped

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Keep the micro-batch; with the last one of a step, move v, and u if it is its turn."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._waiting.append(lambda: self.compute_lower_loss(model, dict(inputs)))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        lowers, self._waiting = self._waiting, []
        optimizer = _within(self.optimizer)
        with self.compute_loss_context_manager():
            if (self.state.global_step + 1) % self.upper_every:
                return optimizer.plain_lower_step(lowers)
            uppers = [self._upper_loss(model) for _ in lowers]
            optimizer.step(uppers, lowers)
        return optimizer.metrics.lower_loss

    def _upper_loss(self, model: nn.Module) -> Callable[[], Tensor]:
        inputs = self._prepare_inputs(self._next_upper_batch())
        return lambda: self.compute_upper_loss(model, dict(inputs))

    # The data of f.

    def get_upper_dataloader(self) -> DataLoader[Any]:
        """Batches of ``upper_dataset``; ``set_epoch`` of the sampler gives each pass its order."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        world = args.world_size, args.process_index
        return DataLoader(
            self.upper_dataset,
            args.train_batch_size,
            sampler=DistributedSampler(self.upper_dataset, *world, seed=seed),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "upper"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            generator=torch.Generator(),
        )

    def _next_upper_batch(self) -> Any:
        """The batch after the last one, also where that was drawn before a resumption."""
        batch = None if self._upper_iterator is None else next(self._upper_iterator, None)
        if batch is None:
            self._upper_iterator = iter(self._rest_of_pass())
            batch = next(self._upper_iterator)
        self._upper_batches += 1
        return batch

    def _rest_of_pass(self) -> Any:
        loader = self.get_upper_dataloader()
        passes, seen = divmod(self._upper_batches, len(loader))
        sampler: Any = loader.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(passes)
        if loader.generator is not None:  # of the workers' random numbers
            loader.generator.manual_seed(self.args.seed + passes)
        return skip_first_batches(loader, seen) if seen else loader

    # The log and the checkpoints.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With ``optimizer.metrics`` beside the training loss."""
        made: Any = self.optimizer  # None before the training
        if "loss" in logs and made is not None:
            log_metrics(_within(made).metrics, logs.update, prefix="bilevel_")
        super().log(logs, *args, **kwargs)

    def _get_learning_rate(self) -> float:
        groups = self.optimizer.param_groups
        return next(float(group["lr"]) for group in groups if group["level"] == "lower")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and u beside it, in ``upper.pt``."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            state = {"upper": self.upper.state_dict(), "upper_batches": self._upper_batches}
            torch.save(state, Path(output_dir or str(self.args.output_dir), _FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = self._upper_state(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.upper.load_state_dict(state["upper"])
        self._upper_batches, self._upper_iterator = state["upper_batches"], None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        self.upper.load_state_dict(self._upper_state(best)["upper"])

    def _upper_state(self, folder: str) -> dict[str, Any]:
        file = Path(folder, _FILE)
        if not file.is_file():
            raise ValueError(
                f"the checkpoint {folder!r} has no {_FILE}, so it is not of a BilevelTrainer; load "
                "its model by from_pretrained and start anew"
            )
        return torch.load(file, map_location=self.args.device, weights_only=True)


def _within(optimizer: Any) -> PenaltyBilevelOptimizer:
    """What Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _leave_out_bare_steps(optimizer: PenaltyBilevelOptimizer) -> None:
    """``step`` without closures does nothing: when ``Trainer`` calls it, the step was taken."""
    take = optimizer.step

    def step(_: PenaltyBilevelOptimizer, upper: Any = None, *rest: Any, **named: Any) -> Any:
        return None if upper is None and not (rest or named) else take(upper, *rest, **named)

    optimizer.step = types.MethodType(step, optimizer)  # bound, as schedulers want it
