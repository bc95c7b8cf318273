"""``python -m examples.mix_sources``: its text, its losses, its gradients, its rows."""

import numpy as np
import pytest
import torch
from small_runs import ran
from tiny_data import write_tar
from torch.nn.functional import cross_entropy

from examples.data.newsgroups import ARCHIVE
from examples.mix_sources import __main__ as mix_sources
from examples.mix_sources import text
from examples.mix_sources.formulation import Mixing, allotted, letter_losses
from examples.mix_sources.methods import METHODS, Rates, alignments
from examples.mix_sources.problem import BINARIES, WANTED, make_mixture
from examples.mix_sources.report import against_uniform, shown
from examples.mix_sources.training import held_out_loss, shares, train
from examples.mix_sources.transformer import Size
from examples.shared import run as shared_run
from examples.shared.run import Run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

GROUPS = [f"{WANTED}{name}" for name in "abcd"] + [f"rec.{name}" for name in "efghijk"]
SENTENCE = "the cat sat on the mat and looked at the dog that had eaten its dinner\n"


def bodies(posts=12):
    """Of each group as many posts as that, each a few of its own sentences."""
    return {g: [f"{g} {n} {SENTENCE * 4}" for n in range(posts)] for g in GROUPS}


def mixture(seed=0):
    return make_mixture((bodies(), bodies(40)), seed)


def mixing(seed=0, windows=23, floor=0.0):
    torch.manual_seed(seed)
    task = Mixing(mixture(seed), Size(width=8, layers=1, context=6), windows, floor)
    with torch.no_grad():
        task.weights.logits.normal_()
    task.hold(task.weights().detach())
    task.draw()
    return task


def by_source(task):
    """L_k by cross entropy of the windows of source k alone."""
    found = []
    for k in range(10):
        windows = task.drawn[task.source == k]
        scores = task.model(windows[:, :-1]).flatten(0, 1)
        found.append(cross_entropy(scores, windows[:, 1:].flatten()))
    return torch.stack(found)


class TestText:
    def test_a_body_is_what_follows_the_header(self):
        assert text.body("From: me\r\nLines: 2\r\n\r\none\t two\r\n \r\n\r\nthree\r\n") == (
            "one two\n\nthree"
        )

    def test_letters_are_symbols_and_others_question_marks(self):
        assert text.decode(text.encode("a\n~ \xe9\u20ac")) == "a\n~ ??"
        assert text.encode(text.ALPHABET).tolist() == list(range(96))

    def test_corruptions(self):
        clean = SENTENCE * 50
        random = np.random.default_rng(0)
        found = {name: corrupt(clean, random) for name, corrupt in text.CORRUPTIONS.items()}
        words = found["letters of words shuffled"].split()
        assert [sorted(word) for word in words] == [sorted(word) for word in clean.split()]
        assert found["letters of words shuffled"].count("\n") == 50
        assert 0 < sum(a == b for a, b in zip(words, clean.split(), strict=True)) < 400
        assert sorted(found["all letters shuffled"]) == sorted(clean)
        assert "dinner" not in found["all letters shuffled"]
        assert found["backwards"][::-1] == clean
        counts = np.bincount(text.encode(found["random letters"]), minlength=96)
        assert counts.sum() == len(clean)
        assert counts.max() < 4 * counts.mean()


class TestMixture:
    def test_kinds_and_texts(self):
        found = mixture()
        assert found.kinds == ["wanted"] * 4 + ["other"] * 2 + ["corrupted"] * 4
        assert found.names[:4] == GROUPS[:4]
        assert len({name.partition(",")[0] for name in found.names}) == 10
        assert found.sources.shape[0] == 10
        for name, kind, symbols in zip(*found[:3], strict=True):
            assert (SENTENCE in text.decode(symbols.numpy())) == (kind != "corrupted"), name
        assert found.of_kind("corrupted").tolist() == [False] * 6 + [True] * 4

    def test_clean_and_test_text_are_apart_and_wanted(self):
        found = mixture()
        texts = [text.decode(t.numpy()) for t in (found.clean, found.test)]
        parts = [{post.strip() for post in t.split("\n\n")[1:-1]} for t in texts]
        assert parts[0]
        assert parts[1]
        assert not parts[0] & parts[1]
        assert all(post.startswith(WANTED) for part in parts for post in part)

    def test_a_seed_draws_everything_again(self):
        first, second, other = mixture(3), mixture(3), mixture(4)
        assert torch.equal(first.sources, second.sources)
        assert torch.equal(first.test, second.test)
        assert first.names != other.names

    def test_too_few_groups(self):
        few = {group: ["a"] for group in GROUPS[:9]}
        with pytest.raises(SystemExit, match="6 other groups"):
            make_mixture((few, few), 0)


def test_windows_are_allotted_by_weight():
    assert allotted([0.5, 0.3, 0.2], 13) == [6, 4, 3]  # 1 each, then 5, 3, 2
    assert allotted([0.98, 0.01, 0.01], 12) == [10, 1, 1]
    assert allotted([0.5, 0.0, 0.5], 7) == [4, 0, 3]
    random = np.random.default_rng(0)
    for weights in random.dirichlet([0.3] * 10, size=50).tolist():
        counts = allotted(weights, 40)
        assert sum(counts) == 40
        assert min(counts) == 1


class TestFormulation:
    def test_losses_by_hand(self):
        task = mixing()
        assert torch.bincount(task.source, minlength=10).tolist() == task.counts.tolist()
        w = torch.softmax(task.weights.logits, 0)
        torch.testing.assert_close(task.lower_loss(), (w * by_source(task)).sum())
        torch.testing.assert_close(task.plain_loss(), task.lower_loss())
        assert task.clean.shape == (11, 7)
        scores = task.model(task.clean[:, :-1]).flatten(0, 1)
        expected = cross_entropy(scores, task.clean[:, 1:].flatten())
        torch.testing.assert_close(task.upper_loss(), expected)
        task.draw(equally=True)
        assert set(task.counts.tolist()) == {2, 3}
        torch.testing.assert_close(task.lower_loss(), (w * by_source(task)).sum())

    def test_windows_are_of_the_source_that_they_are_counted_for(self):
        task = mixing()
        for window, k in zip(task.drawn, task.source, strict=True):
            assert (task.mixture.sources[k].unfold(0, 7, 1) == window).all(1).any()

    def test_the_model_does_not_look_ahead(self):
        task = mixing()
        letters = task.drawn[:, :-1].clone()
        before = task.model(letters)
        letters[:, 4] = (letters[:, 4] + 1) % 96
        after = task.model(letters)
        torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-14)
        assert not torch.allclose(after[:, 4:], before[:, 4:])

    @pytest.mark.parametrize("floor", [0.0, 1.9])
    def test_the_hypergradient_of_the_weights(self, floor):
        """Sum over k of dw_k/du <grad L_k, q>, q the multiplier before the step, by autograd."""
        task = mixing(floor=floor)
        method = METHODS["penalty"][0](task, Rates(1e-2, 0.1), every=1)
        for _ in range(3):
            method.step(0, 0)
        task.draw()
        v = list(task.model.parameters())
        q = [t.clone() for t in method.optimizer.adjoint]
        assert sum(t.abs().sum() for t in q) > 0
        products = []
        for loss in task.source_losses():
            gradient = torch.autograd.grad(loss, v, retain_graph=True)
            products.append(sum((g * t).sum() for g, t in zip(gradient, q, strict=True)))
        (expected,) = torch.autograd.grad(
            task.weights(), task.weights.logits, torch.stack(products)
        )
        method.both_levels()
        # Central differences at 6e-6 of ||v||.
        torch.testing.assert_close(task.weights.logits.grad, expected, rtol=1e-6, atol=1e-9)

    def test_v_follows_g_alone_in_both_kinds_of_steps(self):
        """With weights that do not move: ordinary training, to the accuracy of a sum's order."""
        task, twin = mixing(), mixing()
        with torch.no_grad():
            task.weights.logits.zero_()
        for each in (task, twin):  # equal weights: both draw alike when u moves
            each.hold(torch.full((10,), 0.1))
        method = METHODS["penalty"][0](task, Rates(1e-2, 0.0), every=2)
        plain = METHODS["uniform"][0](twin, Rates(1e-2))
        for number in range(6):
            for each in (method, plain):
                torch.manual_seed(number)
                each.step(number, 0)
        for p, q in zip(task.model.parameters(), twin.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert method.optimizer.metrics.gradient_evaluations == 3 + 3 * (2 + 2 * 2)  # and probes

    def test_alignments_are_products_of_gradients(self):
        task = mixing()
        v = list(task.model.parameters())
        before = [p.detach().clone() for p in v]
        found = alignments(task)
        slope = torch.autograd.grad(task.upper_loss(), v)
        expected = []
        for loss in task.source_losses():
            gradient = torch.autograd.grad(loss, v, retain_graph=True)
            expected.append(sum((g * s).sum() for g, s in zip(gradient, slope, strict=True)))
        # (1e-4 ||v||)^2 times third derivatives, large where letters are still numbers of 0.02: a
        # step ten times as long errs a hundred times as much.
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-2, atol=1e-4)
        assert all(map(torch.equal, before, v))


def test_doremi_by_hand():
    task = mixing()
    task.hold(torch.full((10,), 0.1))
    method = METHODS["doremi"][0](task, Rates(1e-2, 0.7))
    for number in range(3):
        method.step(number, 0)
    torch.manual_seed(5)
    task.draw()
    proxy, reference = (letter_losses(m, task.drawn) for m in (method.proxy, method.reference))
    excess = (proxy - reference).clamp(min=0)
    means = torch.stack([excess[task.source == k].mean() for k in range(10)])
    expected = 0.999 * torch.softmax(0.7 * means, 0) + 1e-4
    torch.manual_seed(5)
    method.step(0, 1)
    torch.testing.assert_close(method.weights(), expected)
    assert expected.max() > 1.1 * expected.min()
    method.step(0, 2)
    torch.testing.assert_close(task.held, expected)


@pytest.mark.parametrize("name", ["penalty", "t1_t2", "doremi"])
def test_a_run_that_was_cut_goes_on_bit_equally(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_run, "SAVE_EVERY", 0.0)
    line, device = {"method": name, "seed": 0}, torch.device("cpu")
    budget = 9 if name != "doremi" else 4
    whole = train(name, mixing(), budget, 2, Run(line, tmp_path / "whole", device))
    kind = METHODS[name][0]
    step, cut_at = kind.step, 10 if name == "doremi" else 7

    def cut(self, number, stage):
        if number + stage * budget == cut_at:
            raise KeyboardInterrupt
        step(self, number, stage)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(name, mixing(), budget, 2, Run(line, tmp_path / "cut", device))
    torch.manual_seed(9)
    later = train(name, mixing(), budget, 2, Run(line, tmp_path / "cut", device, resume=True))
    for key in ("test", "weights"):
        assert later[key] == whole[key]
    values = [[point["weights"] for point in run["path"]] for run in (later, whole)]
    assert values[0] == values[1]


def test_what_the_rows_train_on():
    task = mixing()
    METHODS["oracle"][0](task, Rates(1e-2)).step(0, 0)
    torch.testing.assert_close(task.held, torch.tensor([1 / 6] * 6 + [0.0] * 4))
    assert task.counts[6:].tolist() == [0] * 4
    task = mixing()
    task.mixture.sources.zero_()  # nothing to learn from
    first, target = held_out_loss(task, 50), METHODS["target"][0](task, Rates(1e-2))
    for number in range(60):
        target.step(number, 0)
    assert held_out_loss(task, 50) < first - 0.5


def test_shares_by_hand():
    weights = [0.3, 0.1, 0.1, 0.1, 0.2, 0.1, 0.05, 0.02, 0.02, 0.01]
    expected = {"worst": 0.5, "wanted": 0.6, "other": 0.3, "corrupted": 0.1}
    assert shares(mixing(), weights) == pytest.approx(expected)


def test_the_sentence_by_hand():
    penalty = [{"test": 2.0, "seconds": 3.0, "worst": 0.099}, {"test": 2.1, "seconds": 3.0}]
    penalty[1]["worst"] = 0.101
    uniform = [{"test": 2.3, "seconds": 2.0}, {"test": 2.2, "seconds": 2.0}]
    found = against_uniform({"penalty": penalty, "uniform": uniform})
    assert [run["gain"] for run in found["penalty"]] == pytest.approx([0.3, 0.1])
    assert [run["times"] for run in found["penalty"]] == pytest.approx([1.5, 1.5])
    (sentence,) = shown(found)
    assert "in 1 of 2 seeds" in sentence
    assert "by 0.200 ± 0.141 nats" in sentence


def test_a_small_run_rejects_the_random_letters(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    folder = tmp_path / "data" / "20newsgroups"
    folder.mkdir(parents=True)
    members = {
        f"20news-bydate-{part}/{group}/{n}": f"From: me\n\n{post}".encode()
        for part in ("train", "test")
        for group, posts in bodies().items()
        for n, post in enumerate(posts)
    }
    members |= {f"20news-bydate-train/{BINARIES}/1": b"From: me\n\nM&*9_^"}
    write_tar(folder / ARCHIVE, members)
    words = ["mix_sources", "--method", "all", "--data-dir", str(tmp_path / "data")]
    results = ran(mix_sources, words, tmp_path / "out", monkeypatch, capsys)
    assert set(results) == set(METHODS)
    for name in ("penalty", "t1_t2"):
        weights = dict(zip(results[name]["names"], results[name]["weights"], strict=True))
        noise = next(w for source, w in weights.items() if "random letters" in source)
        # Adam moves a score by at most about 0.05 in each of the ten steps: from 0.1 to 0.063.
        assert noise == min(weights.values()) < 0.085
        assert sum(weights.values()) == pytest.approx(1)
    assert results["uniform"]["weights"] == pytest.approx([0.1] * 10)
    assert results["oracle"]["corrupted"] == 0.0
    assert results["longer"]["path"][-1]["step"] == 1.5 * results["uniform"]["path"][-1]["step"]
