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


def script(name):
    """The script, or a skip where its library is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
        return importlib.import_module(f"examples.trainers.with_{name}")


def test_the_sources_by_hand():
    (sources, clean), *_ = data.loader(2)
    up, down, noise = sources.unbind(1)
    assert (up.diff() % data.TOKENS == 1).all()
    assert (down.diff() % data.TOKENS == data.TOKENS - 1).all()
    assert (clean.diff() % data.TOKENS == 1).all()
    counts = torch.bincount((noise.diff() % data.TOKENS).flatten(), minlength=data.TOKENS)
    assert counts.max() < 3 * counts.float().mean()


def plain(steps):
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

        if number % 4 < 3:
            optimizer.plain_lower_step(g)
        else:
            optimizer.step(f, g)
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
