"""What learns in the few-shot example: gradients by hand, checkpoints, and the command."""

import copy
import json
import pathlib
import sys

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

for library in ("PIL", "pooch", "requests", "tqdm", "matplotlib", "higher", "torchopt"):
    pytest.importorskip(library)

import few_shot as tiny  # noqa: E402

from examples.few_shot import __main__ as command  # noqa: E402
from examples.few_shot.bilevel import Implicit  # noqa: E402
from examples.few_shot.encoders import normalised_by  # noqa: E402
from examples.few_shot.formulation import Features  # noqa: E402
from examples.few_shot.methods import METHODS, NAMES, judged  # noqa: E402
from examples.few_shot.problem import Images, tasks_of  # noqa: E402
from examples.few_shot.rivals import Anil, Maml, Prototypes  # noqa: E402
from examples.shared.run import _restore, _state  # noqa: E402
from examples.shared.solvers import anneal  # noqa: E402

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "omniglot"
SUPPORT, QUERY = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(4)
RATE = 0.05


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def by_sgd(learner):
    """A step of rate 1 without moments shows the gradient."""
    parameters = [p for group in learner.upper_rule.param_groups for p in group["params"]]
    learner.upper_rule = torch.optim.SGD(parameters, lr=1.0)
    return learner


def moved(learner, module, given):
    before = copy.deepcopy(module.state_dict())
    learner.step(given)
    return {name: before[name] - p.detach() for name, p in module.named_parameters()}


class TestUnrolled:
    def test_maml_goes_through_two_steps_of_everything(self):
        learner, given = by_sgd(Maml(tiny.setting(), 0.1, rate=RATE, steps=2)), tiny.images()
        model = copy.deepcopy(learner.model)
        names = [name for name, _ in model.named_parameters()]
        total = 0.0
        with normalised_by(model[0], "batch"):
            for support, query in zip(*(part.chunk(2) for part in given), strict=True):
                values = dict(model.named_parameters())
                for _ in range(2):
                    loss = cross_entropy(functional_call(model, values, (support,)), SUPPORT)
                    slopes = torch.autograd.grad(loss, list(values.values()), create_graph=True)
                    values = {
                        name: values[name] - RATE * slope
                        for name, slope in zip(names, slopes, strict=True)
                    }
                total = total + cross_entropy(functional_call(model, values, (query,)), QUERY) / 2
        expected = torch.autograd.grad(total, list(model.parameters()))
        found = moved(learner, learner.model, given)
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)

    def test_anil_goes_through_two_steps_of_the_head(self):
        learner = by_sgd(Anil(tiny.setting(), 0.1, rate=RATE, steps=2))
        learner.head.weight.data.normal_()
        encoder, head, given = copy.deepcopy(learner.encoder), learner.head, tiny.images()
        parts = [encoder(part).chunk(2) for part in given]
        total = 0.0
        start = tuple(p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
        for support, query in zip(*parts, strict=True):
            weight, bias = start
            for _ in range(2):
                loss = cross_entropy(support @ weight.T + bias, SUPPORT)
                slopes = torch.autograd.grad(loss, (weight, bias), create_graph=True)
                weight, bias = weight - RATE * slopes[0], bias - RATE * slopes[1]
            total = total + cross_entropy(query @ weight.T + bias, QUERY) / 2
        expected = torch.autograd.grad(total, [*encoder.parameters(), *start])
        before = [p.detach().clone() for p in (*learner.encoder.parameters(), *head.parameters())]
        learner.step(given)
        after = (*learner.encoder.parameters(), *head.parameters())
        for old, new, gradient in zip(before, after, expected, strict=True):
            torch.testing.assert_close(old - new.detach(), gradient, rtol=1e-8, atol=1e-10)

    def test_prototypes_fall_with_the_squared_distance(self):
        learner = Prototypes(tiny.setting(), 0.1, sharpness=0.7)
        features = Features(torch.randn(2, 6, 4), torch.randn(2, 12, 4))
        found = learner.scores(features).log_softmax(-1)
        means = features.support.view(2, 3, 2, 4).mean(2)
        expected = -0.7 * torch.cdist(features.query, means).square()
        torch.testing.assert_close(found, expected.log_softmax(-1))


class TestImplicit:
    @pytest.mark.parametrize("warm", [False, True])
    def test_heads_start_at_zero_or_where_they_were(self, warm, monkeypatch):
        learner = Implicit(tiny.setting(), 1e-3, decay=0.3, rate=0.1, steps=3, warm=warm)
        learner.step(tiny.images())
        ended = learner.task.heads.weight.detach().clone()
        assert ended.any()
        starts = []
        held = learner.task.held
        monkeypatch.setattr(
            learner.task,
            "held",
            lambda: (starts.append(learner.task.heads.weight.detach().clone()), held())[1],
        )
        learner.step(tiny.images(1))
        assert torch.equal(starts[0], ended if warm else torch.zeros_like(ended))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", [False, True])
def test_a_learner_goes_on_from_a_checkpoint(name, cosine):
    """Bit-equal, without a warning; and its predictions are classes."""
    make = METHODS["omniglot"][name]
    if cosine and name.startswith("implicit"):
        with pytest.raises(SystemExit, match="--head linear"):
            make(tiny.setting(cosine=True))
        return
    learner, other = make(tiny.setting(cosine=cosine)), make(tiny.setting(1, cosine))
    pairs = [((one.encoder, one.lower_steps, *one.kept())) for one in (learner, other)]
    for number in range(2):
        anneal([learner.upper_rule], number / 3)
        learner.step(tiny.images(number))
    for item, twin in zip(*pairs, strict=True):
        _restore(twin, copy.deepcopy(_state(item)))
    for one in (learner, other):
        torch.manual_seed(7)  # of cosine heads
        anneal([one.upper_rule], 2 / 3)
        one.step(tiny.images(2))
    for one, twin in zip(learner.encoder.parameters(), other.encoder.parameters(), strict=True):
        assert torch.equal(one, twin)
    assert learner.lower_steps == other.lower_steps
    learner.encoder.float()
    for item in learner.kept():
        if isinstance(item, torch.nn.Module):
            item.float()
    torch.set_default_dtype(torch.float)
    pool = torch.rand(5, 6, 1, 16, 16).mul(255).to(torch.uint8)
    tasks = tasks_of(pool, tiny.SIZE, 4, torch.Generator().manual_seed(0))
    before = copy.deepcopy(learner.encoder.state_dict())
    for is_transductive in (False, True):
        look = judged(learner, pool, tasks, is_transductive)
        assert look.accuracies.shape == (4,)
        assert len(look.told) == 12
        assert set(look.told) <= {0, 1, 2}
    for key, value in learner.encoder.state_dict().items():  # a test changes nothing
        assert torch.equal(value, before[key])


def test_told_alone_a_query_image_does_not_see_the_others():
    """With the query set in another order, and one image replaced, the others are told alike."""
    for name in ("penalty", "maml"):
        torch.set_default_dtype(torch.float)
        setting = tiny.setting()
        setting.encoder.float()
        learner = METHODS["omniglot"][name](setting)
        given = Images(*(part.float() for part in tiny.images()))
        for _ in range(3):
            learner.step(given)
        pool = torch.rand(3, 7, 1, 16, 16).mul(255).to(torch.uint8)
        tasks = tasks_of(pool[:, :6], tiny.SIZE, 1, torch.Generator().manual_seed(0))
        told = judged(learner, pool, tasks, False).told
        tasks.images[0, 2, 5] = 6  # the last query image of all
        assert judged(learner, pool, tasks, False).told[:-1] == told[:-1]


def test_the_command_runs_and_learns(tmp_path, monkeypatch, capsys):
    if not DATA.is_dir():
        pytest.skip("Omniglot is not beside the checkout; tests download nothing")
    torch.set_default_dtype(torch.float)
    words = ["--smoke", "--method", "penalty", "maml", "prototypes", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["few_shot", *words, "--device", "cpu"])
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "results.json").read_text())
    results = {run["run"]["method"]: run["result"] for run in content["runs"]}
    assert set(results) == {"penalty", "maml", "prototypes"}
    for result in results.values():
        seconds = [point["seconds"] for point in result["path"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] >= 1.0
        assert 0 < result["alone_interval"] < 1
        assert len(result["told"]) == 25
    # Classes never seen, one in five by chance.
    assert results["penalty"]["path"][-1]["accuracy"] > 0.35
    assert results["penalty"]["lower_steps"] > 1
    assert (tmp_path / "few_shot.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "omniglot, 5-way 1-shot, 5 query images per class" in said
    assert all(f"| {name} |" in said for name in results)
