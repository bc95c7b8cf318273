"""The rows of ``python -m examples.denoise`` that learn no weights, and the training of all."""

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn")

from denoising import problem

from examples.denoise.learned import score
from examples.denoise.problem import make_model
from examples.denoise.rows import ROWS, accuracy, fit
from examples.denoise.settings import MNIST, Training


class TestRows:
    def test_scores_by_hand(self):
        found = problem()
        oracle, noisy = (ROWS[name](found, MNIST.training) for name in ("oracle", "noisy"))
        assert score(oracle, found) == {
            "told_right": 1.0,
            "auc": 1.0,
        }
        assert score(noisy, found) == {"told_right": 0.5, "auc": 0.5}
        assert score(1 - oracle, found) == {
            "told_right": 0.0,
            "auc": 0.0,
        }

    def test_what_is_not_kept_is_not_seen(self):
        found = problem()
        changed = found._replace(
            images=torch.where(found.is_right[:, None, None, None], 1, 0) * found.images
        )
        how = MNIST.training._replace(epochs={"other": 60})
        models = [fit(p, p.is_right, "oracle", how) for p in (found, changed)]
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert accuracy(models[0], found.test_images, found.test_labels) > 0.9

    def test_filters_keep_what_a_model_agrees_with(self):
        found = problem()
        kept = ROWS["agreement"](found, MNIST.training)
        assert score(kept, found)["told_right"] > 0.9
        assert set(kept.unique().tolist()) == {0.0, 1.0}

    def test_a_share_of_the_epochs(self):
        names = ("validation", "noisy", "filter", "penalty")
        for share, expected in ((1.0, [100, 10, 5, 40]), (0.25, [25, 2, 1, 10]), (0.01, [1] * 4)):
            how = MNIST.training.shorter(share)
            assert [how.epochs_of(name) for name in names] == expected

    def test_weights_count_as_so_many_images(self):
        """1 on everything and the clean images twice is 1/2 on everything and these once."""
        found = problem(clean=100)
        twice = found._replace(
            clean_images=torch.cat([found.clean_images] * 2),
            clean_labels=torch.cat([found.clean_labels] * 2),
        )
        plain = MNIST.training._replace(batch=1000, epochs={"other": 5})
        halves = torch.full((400,), 0.5)
        weighted = fit(found, halves, "penalty", plain._replace(weighted=True))
        counted = fit(twice, torch.ones(400), "penalty", plain)
        for p, q in zip(weighted.parameters(), counted.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

    def test_a_rate_that_falls_and_a_decay_by_hand(self):
        """Two epochs of full batches: Adam at the rates 0.1 and 0.05 on the loss with decay."""
        found = problem()
        how = Training(
            rate=0.1, falls=True, batch=1000, epochs={"other": 2}, decay={"noisy": 0.3, "other": 0}
        )
        everything = torch.ones_like(found.is_right)
        fitted = fit(found, everything, "noisy", how)
        model = make_model(found, found.seed + 1000)
        images = torch.cat([found.images, found.clean_images])
        labels = torch.cat([found.labels, found.clean_labels])
        rule = torch.optim.Adam(model.parameters(), lr=0.1)
        for rate in (0.1, 0.05):
            rule.param_groups[0]["lr"] = rate
            rule.zero_grad()
            squares = sum(p.square().sum() for p in model.parameters())
            (cross_entropy(model(images), labels) + 0.15 * squares).backward()
            rule.step()
        for p, q in zip(fitted.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
