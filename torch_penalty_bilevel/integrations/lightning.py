"""A callback for Lightning: what the log shows, and the random state that its checkpoints lack."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..metrics import Metrics
from ..optimizers.two_level import TwoLevelOptimizer
from .logs import log_metrics

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    from .missing import missing

    raise missing("lightning") from error


class BilevelCallback(Callback):
    """Logs ``optimizer.metrics``, and makes a resumed run bit-equal.

    For modules with ``automatic_optimization = False`` whose ``configure_optimizers`` returns the
    bilevel optimizer and whose ``training_step`` calls
    ``self.optimizers().step(closure=f, lower_closure=g)``. Everything else is in Lightning's
    checkpoints already, u too where the module has it; the state of the random generators is not,
    so that a resumed run draws other dropout masks and another order of the data. Lightning
    goes on with an epoch that was cut only where the loader has a ``state_dict``: save at its end
    (``ModelCheckpoint(save_on_train_epoch_end=True)``, which ``val_check_interval`` alone is not).

    Args:
        prog_bar: metrics that the progress bar shows.
        prefix: of every name in the log.

    Raises:
        ValueError: at the start, where no optimizer of the module has ``metrics``: one that
            Lightning does not know is not in its checkpoints, and neither is its multiplier.
    """

    def __init__(
        self, prog_bar: tuple[str, ...] = ("relative_certificate",), prefix: str = "bilevel/"
    ) -> None:
        unknown = set(prog_bar) - Metrics.unknown().as_dict().keys()
        if unknown:
            raise ValueError(f"prog_bar names {sorted(unknown)}, which Metrics does not have")
        self.prog_bar, self.prefix = prog_bar, prefix
        self._random: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the random state of the checkpoint: the next thing drawn is the order of data."""
        if not _bilevel(trainer):
            kinds = ", ".join(type(o).__name__ for o in trainer.optimizers) or "nothing"
            raise ValueError(
                f"configure_optimizers returned {kinds}; return the PenaltyBilevelOptimizer "
                "itself, so that its multiplier is in the checkpoints"
            )
        if self._random is not None:
            _restore(self._random)
            self._random = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hand the numbers to Lightning, which writes them every ``log_every_n_steps``."""
        for number, optimizer in enumerate(_bilevel(trainer)):
            prefix = self.prefix if number == 0 else f"{self.prefix}{number}/"
            shown = {f"{prefix}{name}" for name in self.prog_bar}

            def write(numbers: Mapping[str, float], shown: set[str] = shown) -> None:
                for name, value in numbers.items():
                    pl_module.log(name, value, prog_bar=name in shown)

            log_metrics(optimizer.metrics, write, prefix=prefix)

    def state_dict(self) -> dict[str, Any]:
        """Of the random generators: torch's, also on GPUs, Python's, NumPy's."""
        numpy_random: Any = sys.modules.get("numpy.random")
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if numpy_random is not None:
            kind, words, *rest = numpy_random.get_state()
            state["numpy"] = (kind, words.tolist(), *rest)  # without arrays: weights_only reads it
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the fit starts: what is built before draws for itself."""
        self._random = state_dict


def _bilevel(trainer: Trainer) -> list[Any]:
    return [o for o in trainer.optimizers if isinstance(o, TwoLevelOptimizer)]


def _restore(state: Mapping[str, Any]) -> None:
    # Lightning moves what it loads to the device of the model.
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "numpy" in state:
        importlib.import_module("numpy.random").set_state(state["numpy"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
