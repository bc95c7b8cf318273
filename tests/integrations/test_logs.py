"""``log_metrics`` with the real loggers: what was written is read back."""

import functools
import logging
import math

import pytest
import torch
from torch import nn

from torch_penalty_bilevel import Metrics, PenaltyBilevelOptimizer
from torch_penalty_bilevel.integrations import log_metrics

NAMES = {f"bilevel/{name}" for name in Metrics.__dataclass_fields__}


class Solving:
    """f = (u - 1)^2 + v^2, g = (v - u)^2 / 2."""

    def __init__(self):
        self.u, self.v = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        self.optimizer = PenaltyBilevelOptimizer([self.u], [self.v], upper_lr=0.1, lower_lr=0.1)

    def f(self):
        return (self.u - 1).square().sum() + self.v.square().sum()

    def g(self):
        return (self.v - self.u).square().sum() / 2

    def steps(self, count):
        """What ``metrics`` say after each, beginning with 0."""
        for step in range(count):
            self.optimizer.step(self.f, self.g)
            yield step, self.optimizer.metrics


def written_of(metrics):
    return {f"bilevel/{k}": v for k, v in metrics.as_dict().items() if math.isfinite(v)}


def test_names_and_numbers_are_those_of_metrics():
    """At (0, 1): f = 2, g = 1/2, r = 1, grad_v f = 2."""
    calls = []
    *_, (_, metrics) = Solving().steps(1)
    returned = log_metrics(metrics, calls.append)
    assert calls == [returned] == [written_of(metrics)]
    assert returned.keys() == NAMES
    assert returned["bilevel/upper_loss"] == 2.0
    assert returned["bilevel/lower_loss"] == 0.5
    assert returned["bilevel/residual_norm"] == 1.0
    assert returned["bilevel/relative_certificate"] == 1.0  # q = 0 then
    assert all(type(number) is float for number in returned.values())
    assert log_metrics(metrics, calls.append, prefix="").keys() == set(metrics.as_dict())


def test_what_is_not_finite_is_left_out():
    task = Solving()
    assert log_metrics(task.optimizer.metrics, len) == {"bilevel/gradient_evaluations": 0.0}
    task.optimizer.lower_step(task.f, task.g)
    assert NAMES - log_metrics(task.optimizer.metrics, len).keys() == {"bilevel/upper_grad_norm"}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    expected = {}
    with SummaryWriter(str(tmp_path)) as writer:
        for step, metrics in Solving().steps(3):
            for name, number in log_metrics(metrics, writer, step=10 * step).items():
                expected.setdefault(name, []).append((10 * step, number))
        with pytest.raises(ValueError, match="step is None, and TensorBoard would put all points"):
            log_metrics(metrics, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == NAMES == expected.keys()
    for name, points in expected.items():
        found = events.Scalars(name)
        assert [point.step for point in found] == [step for step, _ in points]
        # Event files have float32.
        assert [point.value for point in found] == pytest.approx([n for _, n in points], rel=1e-6)


def records(path):
    """Of a run's file of Weights & Biases: a log of LevelDB with protobufs in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # the end of a block holds no header
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path, monkeypatch):
    for name, value in (("MODE", "offline"), ("ERROR_REPORTING", "false"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    try:
        expected = []
        for step, metrics in Solving().steps(2):
            expected.append((5 * step, log_metrics(metrics, run, step=5 * step)))
        run.log({}, step=6)
        expected += [(step, log_metrics(metrics, run)) for step in (6, 7)]  # counts by itself
    finally:
        run.finish()
        wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    found = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            numbers = {k: float(v) for k, v in items.items() if k.startswith("bilevel/")}
            found.append((int(items["_step"]), numbers))
    assert found == expected


def test_a_logger_of_lightning(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)
    expected = [log_metrics(metrics, logger, step=step) for step, metrics in Solving().steps(2)]
    logger.save()
    (file,) = tmp_path.rglob("metrics.csv")
    head, *lines = [line.split(",") for line in file.read_text().splitlines()]
    rows = [dict(zip(head, map(float, line), strict=True)) for line in lines]
    assert [row.pop("step") for row in rows] == [0, 1]
    assert rows == expected


def test_a_function_takes_a_dict_and_a_step():
    calls = []
    *_, (_, metrics) = Solving().steps(1)

    def write(numbers, step):
        calls.append((numbers, step))

    written = log_metrics(metrics, write, step=7)
    log_metrics(metrics, functools.partial(write, step=8))
    assert calls == [(written, 7), (written, 8)]


class LikeTrainer:
    """``log_metrics`` of Hugging Face's Trainer takes a split and prints."""

    def log(self, logs):
        self.logs = logs

    def log_metrics(self, split, metrics):
        raise AssertionError


def test_the_method_that_takes_a_dict_is_found():
    *_, (_, metrics) = Solving().steps(1)
    trainer = LikeTrainer()
    assert log_metrics(metrics, trainer) == trainer.logs


def test_a_lightning_module_counts_by_itself():
    class Module(nn.Module):
        def log(self, name, value):
            raise AssertionError

        def log_dict(self, numbers):
            self.numbers = numbers

    *_, (_, metrics) = Solving().steps(1)
    module = Module()
    assert log_metrics(metrics, module) == module.numbers
    with pytest.raises(ValueError, match="step is 3, but a Lightning module counts by itself"):
        log_metrics(metrics, module, step=3)


def test_fabric_takes_a_step(tmp_path):
    fabric = pytest.importorskip("lightning.fabric")
    logger = fabric.loggers.CSVLogger(tmp_path)
    runs = fabric.Fabric(accelerator="cpu", loggers=logger)
    *_, (_, metrics) = Solving().steps(1)
    log_metrics(metrics, runs, step=4)
    logger.save()
    (file,) = tmp_path.rglob("metrics.csv")
    head, row = (line.split(",") for line in file.read_text().splitlines())
    assert float(row[head.index("step")]) == 4
    assert float(row[head.index("bilevel/upper_loss")]) == 2.0


def test_mlflow_s_log_dict_writes_a_file_and_is_passed_over():
    class LikeMlflow:
        def log_dict(self, dictionary, artifact_file, run_id=None):
            raise AssertionError

        def log_metrics(self, metrics, step=None, synchronous=None):
            self.written = metrics, step

    *_, (_, metrics) = Solving().steps(1)
    mlflow = LikeMlflow()
    for step in (3, None):
        assert (log_metrics(metrics, mlflow, step=step), step) == mlflow.written


@pytest.mark.parametrize("logger", [None, nn.Linear(1, 1), dict, "runs"])
def test_what_is_no_logger_is_named(logger):
    *_, (_, metrics) = Solving().steps(1)
    with pytest.raises(TypeError, match=rf"logger is {type(logger).__name__}; give a Summary"):
        log_metrics(metrics, logger)


def test_what_are_no_metrics_is_named():
    with pytest.raises(TypeError, match=r"metrics must be optimizer.metrics, got dict"):
        log_metrics({"loss": 1.0}, print)


def test_python_s_own_logging(caplog):
    *_, (_, metrics) = Solving().steps(1)
    with caplog.at_level(logging.INFO):
        log_metrics(metrics, logging.getLogger("run").info)
    assert "'bilevel/relative_certificate': 1.0" in caplog.text
