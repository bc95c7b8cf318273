"""The scripts of ``examples/trainers``, with the real libraries."""

import importlib
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from examples.mix_sources.transformer import Size, Transformer
from examples.trainers import data
from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.nn import SourceWeights

pytestmark = [
    # Theirs, about their own parts and loaders without workers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(autouse=True)
def _float32():
    torch.set_default_dtype(torch.float32)


def script(name, library=None):
    """The script, or a skip where its library is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library or name)
        return importlib.import_module(f"examples.trainers.with_{name}")


def test_the_sources_by_hand():
    (sources, clean), *_ = data.loader(2)
    up, down, noise = sources.unbind(1)
    assert (up.diff() % data.TOKENS == 1).all()
    assert (down.diff() % data.TOKENS == data.TOKENS - 1).all()
    assert (clean.diff() % data.TOKENS == 1).all()
    counts = torch.bincount((noise.diff() % data.TOKENS).flatten(), minlength=data.TOKENS)
    assert counts.max() < 3 * counts.float().mean()


def plain(steps, every=4, before=lambda *_: None, after=lambda *_: None):
    """The loop that users write by themselves, and its loss written out."""
    model, weights = Transformer(Size(32, 1, data.LENGTH)), SourceWeights(3)
    optimizer = PenaltyBilevelOptimizer(
        weights.parameters(),
        model.parameters(),
        upper_lr=0.1,
        lower_lr=3e-3,
        curvature="finite_difference",
    )

    def loss(tokens):
        scores = model(tokens[:, :-1]).transpose(1, 2)
        return cross_entropy(scores, tokens[:, 1:], reduction="none").mean()

    for number, (sources, clean) in enumerate(data.loader(steps)):

        def f(clean=clean):
            return loss(clean)

        def g(sources=sources):
            return weights() @ torch.stack([loss(tokens) for tokens in sources.unbind(1)])

        before(model, clean)
        if (number + 1) % every:
            optimizer.plain_lower_step(g)
        else:
            optimizer.step(f, g)
        after(optimizer)
    return weights().detach()


@pytest.mark.parametrize(
    ("name", "on_cpu"), [("accelerate", {"cpu": True}), ("lightning", {"accelerator": "cpu"})]
)
def test_loops_of_others_are_the_plain_loop(name, on_cpu, tmp_path, monkeypatch):
    main = script(name).main
    monkeypatch.chdir(tmp_path)
    found = main(24, **on_cpu)
    torch.manual_seed(0)
    expected = plain(24)
    assert torch.equal(found, expected)
    assert expected.max() > 0.36


@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_models_of_others_find_the_source_that_helps(name):
    up, down, noise = script(name).main(60).tolist()
    assert up > 0.5
    assert max(down, noise) < 0.3


def test_hugging_face_s_trainer_finds_the_source_that_helps(tmp_path):
    main = script("trainer", "transformers").main
    up, down, noise = main(60, str(tmp_path), cpu=True).tolist()
    assert up > 0.5
    assert max(down, noise) < 0.3


def test_torchmetrics_see_each_batch_once():
    """Accuracy before each of four steps, in twos; the mean of two certificates."""
    found = script("torchmetrics").main(4, every=2)
    torch.manual_seed(0)
    rights, certificates = [], []

    def keep(optimizer):
        certificates.append(optimizer.metrics.relative_certificate)

    def see(model, clean):
        with torch.no_grad():
            right = model(clean[:, :-1]).argmax(-1) == clean[:, 1:]
        rights.append(float(right.double().mean()))

    plain(4, every=1, before=see, after=keep)
    pairs = zip(rights[::2], rights[1::2], certificates[::2], certificates[1::2], strict=True)
    expected = [((a + b) / 2, float(c + d) / 2) for a, b, c, d in pairs]
    for reading, wanted in zip(found, expected, strict=True):
        assert reading == pytest.approx(wanted, rel=1e-6)
    assert expected[0][0] > 0.0


def test_optuna_compares_what_is_solved_again():
    optuna = pytest.importorskip("optuna")
    ridge = script("optuna")
    study = ridge.main(12)
    states = [trial.state for trial in study.trials]
    assert states.count(optuna.trial.TrialState.PRUNED) >= 2
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert study.best_value == min(trial.value for trial in complete)
    for trial in study.trials[4:]:  # pruned where it is worse than the median of those before
        before = [t for t in study.trials[: trial.number] if t in complete]
        last, value = max(trial.intermediate_values.items())
        at_last = torch.tensor([t.intermediate_values[last] for t in before])
        # optuna compares the best value so far with the median, between two middles their mean.
        best = min(trial.intermediate_values.values())
        if trial.state == optuna.trial.TrialState.PRUNED:
            assert best > float(at_last.quantile(0.5))
        else:
            assert value == trial.value
    again = optuna.trial.FixedTrial(study.best_params)
    assert ridge.objective(again) == study.best_value


def test_the_re_solved_loss_of_the_optuna_example():
    """g is stationary at the v that it takes, and f there is what it says."""
    task = script("optuna").Ridge()
    with torch.no_grad():
        task.u.copy_(torch.linspace(-1, 1, len(task.u)))
    rule = torch.optim.LBFGS([task.v], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        rule.zero_grad()
        loss = task.lower()
        loss.backward()
        return loss

    rule.step(closure)
    assert float(task.v.grad.norm()) < 1e-10
    assert task.resolved() == pytest.approx(float(task.upper().detach()), rel=1e-9)
