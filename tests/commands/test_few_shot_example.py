"""The few-shot example: its data, encoders, losses and heads against slower ways to get them."""

import math

import pytest
import torch
from torch.func import hessian
from torch.nn.functional import cross_entropy

for library in ("PIL", "pooch", "requests", "tqdm", "matplotlib", "higher", "torchopt"):
    pytest.importorskip(library)

import few_shot as tiny  # noqa: E402

from examples.few_shot import problem  # noqa: E402
from examples.few_shot.embedded import embedded, mean_and_interval  # noqa: E402
from examples.few_shot.encoders import Conv4, ResNet, Shift, normalised_by  # noqa: E402
from examples.few_shot.fitted import fitted, fitted_cosine  # noqa: E402
from examples.few_shot.head_curvature import HeadCurvature  # noqa: E402
from examples.few_shot.problem import Size, Split  # noqa: E402

DECAY = tiny.DECAY


class TestData:
    @pytest.fixture
    def omniglot(self, monkeypatch):
        """A character's number is written in bits into the first row of its images."""
        bits = torch.zeros(1623, 20, 28, 28, dtype=torch.bool)
        numbers = torch.arange(1623)[:, None] >> torch.arange(11) & 1
        bits[:, :, 0, :11] = numbers[:, None].bool()
        names = tuple(map(str, range(1623)))
        there = problem.omniglot.__globals__["Omniglot"](bits, names, torch.zeros(1623).bool())
        monkeypatch.setattr(problem, "omniglot", lambda folder: there)

    @staticmethod
    def characters(images, count):
        return set((images[:count, 0, 0, 0, :11].long() << torch.arange(11)).sum(1).tolist())

    def test_characters_to_learn_from_and_of_tests_are_disjoint(self, omniglot):
        split = problem.load("omniglot", None)
        assert split.learned.shape == (4800, 20, 1, 28, 28)
        assert split.unseen.shape == (1692, 20, 1, 28, 28)
        learned, unseen = self.characters(split.learned, 1200), self.characters(split.unseen, 423)
        assert len(learned) == 1200
        assert len(unseen) == 423
        assert not learned & unseen
        chosen = problem.load("omniglot", None, validation=True)
        held_out = self.characters(chosen.unseen, 100)
        assert held_out < learned
        assert self.characters(chosen.learned, 1100) == learned - held_out

    def test_a_class_is_turned_as_a_whole(self):
        images = torch.rand(2, 3, 1, 4, 4)
        turned = problem.turned(images)
        assert turned.shape == (8, 3, 1, 4, 4)
        for quarters in range(4):
            torch.testing.assert_close(
                turned[2 * quarters + 1, 2, 0], images[1, 2, 0].rot90(quarters)
            )

    @pytest.mark.parametrize("several", [True, False])
    def test_no_image_is_in_both_sets_and_no_class_twice(self, several):
        numbers = torch.arange(12 * 7, dtype=torch.uint8).view(12, 7, 1, 1, 1)
        size, generator = Size(3, 2, 4), torch.Generator().manual_seed(0)
        cpu = torch.device("cpu")
        if several:
            support, query = problem.meta_batch(numbers, size, 4, generator, cpu)
        else:
            tasks = problem.tasks_of(numbers, size, 1, generator)
            found = numbers[tasks.classes[0], tasks.images[0]].float() / 255
            support, query = found[:, :2].flatten(0, 1), found[:, 2:].flatten(0, 1)
        values = [(part.flatten() * 255).round().long() for part in (support, query)]
        ways = 12 if several else 3
        assert len(torch.cat(values).unique()) == ways * 6
        first, second = values[0].view(ways, 2) // 7, values[1].view(ways, 4) // 7
        assert len(first[:, 0].unique()) == ways
        assert (first == first[:, :1]).all()
        assert (second == first[:, :1]).all()

    def test_tasks_that_cannot_be_are_refused(self):
        images = torch.zeros(9, 7, 1, 1, 1)
        with pytest.raises(
            SystemExit, match=r"meta-batch \* --ways asks for 12 classes; there are 9"
        ):
            problem.check(Split(images, images), Size(3, 2, 4), 4)
        with pytest.raises(SystemExit, match=r"--shots 2 and --queries 6 ask for more than the 7"):
            problem.check(Split(images, images), Size(3, 2, 6), 1)


class TestEncoders:
    def test_numbers_of_parameters_and_features(self):
        for encoder, shape, count, features in (
            (Conv4(1, 64), (1, 28, 28), 111_424, 64),
            (Conv4(3, 32), (3, 84, 84), 28_640, 800),
            (ResNet(3), (3, 84, 84), 3_543_424, 384),
        ):
            assert sum(p.numel() for p in encoder.parameters()) == count
            assert encoder(torch.rand(2, *shape)).shape == (2, features)

    def test_where_statistics_come_from(self):
        torch.manual_seed(0)
        shift = Shift(2).double()
        shift.bias.data.copy_(torch.tensor([1.0, -2.0]))
        batches = [torch.randn(6, 2, 3, 3, dtype=torch.double) * 3 + 5 for _ in range(2)]

        def by(x, mean, var):
            scaled = (x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
            return scaled + shift.bias[:, None, None]

        means = [x.mean((0, 2, 3)) for x in batches]
        variances = [x.transpose(0, 1).flatten(1).var(1, correction=0) for x in batches]
        for x, mean, var in zip(batches, means, variances, strict=True):
            torch.testing.assert_close(shift(x), by(x, mean, var))
        with normalised_by(shift, "batch"):
            torch.testing.assert_close(shift(batches[0]), by(batches[0], means[0], variances[0]))
        with normalised_by(shift, "running"):  # of the first batches: their mean
            unbiased = sum(variances) / 2 * 54 / 53
            torch.testing.assert_close(shift(batches[0]), by(batches[0], sum(means) / 2, unbiased))
        with normalised_by(shift, 6):
            both = shift(torch.cat(batches))
            torch.testing.assert_close(both, by(torch.cat(batches), means[0], variances[0]))
        assert shift.training
        assert int(shift.batches) == 2

    @pytest.mark.parametrize("statistics", ["running", "batch", None])
    def test_features_of_test_tasks(self, statistics):
        encoder = tiny.encoder()
        encoder(torch.rand(9, 1, 16, 16, dtype=torch.double))
        pool = torch.rand(4, 6, 1, 16, 16).mul(255).to(torch.uint8)
        tasks = problem.tasks_of(pool, tiny.SIZE, 3, torch.Generator().manual_seed(0))
        found = embedded(encoder.float(), pool, tasks, 2, statistics)
        for number, (classes, chosen) in enumerate(zip(*tasks, strict=True)):
            own = pool[classes, chosen].float() / 255
            support, query = own[:, :2].flatten(0, 1), own[:, 2:].flatten(0, 1)
            with normalised_by(encoder, 6 if statistics is None else statistics), torch.no_grad():
                if statistics is None:
                    expected = encoder(torch.cat([support, query])).split([6, 12])
                else:
                    expected = encoder(support), encoder(query)
            for part, slow in zip(found, expected, strict=True):
                torch.testing.assert_close(part[number], slow, rtol=1e-4, atol=1e-5)  # float32

    def test_the_interval_is_that_of_a_mean(self):
        mean, interval = mean_and_interval(torch.tensor([0.5, 1.0, 0.75, 0.25]))
        assert mean == 0.625
        assert interval == pytest.approx(1.96 * math.sqrt((2 * 0.125**2 + 2 * 0.375**2) / 3 / 4))


class TestHeads:
    @pytest.mark.parametrize("cosine", [False, True])
    def test_losses_task_by_task(self, cosine):
        task = tiny.bilevel(cosine)
        given = tiny.images()
        task.begin(given)
        for parameter in task.heads.parameters():
            parameter.data.normal_()
        upper = lower = 0.0
        sets = zip(*(task.encoder(part).chunk(2) for part in given), strict=True)
        for number, (support, query) in enumerate(sets):
            weight, bias = task.heads.weight[number], task.heads.bias[number]
            rows = torch.cat([weight, bias[:, None]], 1)

            def score(x, rows=rows):
                longer = torch.cat([x, torch.tensor([1e-3 if cosine else 1.0])])
                length = longer.norm() * rows.norm(dim=1) / 10 if cosine else 1.0
                return rows @ longer / length

            for x, label in zip(support, [0, 0, 1, 1, 2, 2], strict=True):
                lower = lower - score(x).log_softmax(0)[label] / 12
            for x, label in zip(query, [c for c in range(3) for _ in range(4)], strict=True):
                upper = upper - score(x).log_softmax(0)[label] / 24
            sizes = rows.square().sum(1)
            lower = lower + DECAY / 4 * ((sizes - 1).square() if cosine else sizes).sum()
        torch.testing.assert_close(task.upper_loss(), upper)
        torch.testing.assert_close(task.lower_loss(), lower)

    def test_powers_of_the_bound_and_that_it_bounds(self):
        task = tiny.bilevel()
        task.begin(tiny.images())
        curvature = HeadCurvature(DECAY)
        curvature.at(task.features.support.detach())
        for exponent in (-1.0, -0.5, 0.5, 1.0):
            vectors = torch.randn_like(task.heads.weight), torch.randn_like(task.heads.bias)
            weight, bias = curvature.power(vectors, exponent)
            for number, x in enumerate(task.features.support.detach()):
                x = torch.cat([x, torch.ones(6, 1)], 1)
                bound = (x.T @ x / 12 + DECAY * torch.eye(5)) / 2
                values, directions = torch.linalg.eigh(bound.double())
                power = directions @ torch.diag(values**exponent) @ directions.T
                rows = torch.cat([vectors[0][number], vectors[1][number][:, None]], 1) @ power
                torch.testing.assert_close(weight[number], rows[:, :-1])
                torch.testing.assert_close(bias[number], rows[:, -1])

                def lower(v, x=x):
                    loss = cross_entropy(x @ v.T, torch.tensor([0, 0, 1, 1, 2, 2]))
                    return (loss + DECAY / 2 * v.square().sum()) / 2

                for scale in (0.0, 1.0):
                    point = scale * torch.randn(3, 5, dtype=torch.double)
                    curved = hessian(lower)(point).reshape(15, 15)
                    above = torch.kron(torch.eye(3), bound) - curved
                    assert torch.linalg.eigvalsh(above).min() > -1e-12

    @pytest.mark.parametrize("decay", [1e-3, 1.0])
    def test_fitted_heads_are_those_of_a_general_minimiser(self, decay):
        torch.manual_seed(0)
        support = 3 * torch.randn(2, 6, 4, dtype=torch.double)
        found = fitted(support, 3, decay)
        labels = torch.tensor([0, 0, 1, 1, 2, 2])
        for x, rows in zip(support, found, strict=True):
            x = torch.cat([x, torch.ones(6, 1)], 1)
            v = torch.zeros(3, 5, dtype=torch.double, requires_grad=True)
            rule = torch.optim.LBFGS(
                [v], max_iter=1000, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
            )

            def lower(x=x, v=v, rule=rule):
                rule.zero_grad()
                loss = cross_entropy(x @ v.T, labels) + decay / 2 * v.square().sum()
                loss.backward()
                return loss

            rule.step(lower)
            # To the tolerance of the fit: 1e-4 of the first gradient, by the least curvature.
            torch.testing.assert_close(rows, v.detach(), rtol=0, atol=2e-4 / decay)

    def test_fitted_heads_of_strong_decay_are_one_gradient_step(self):
        support, decay = torch.randn(1, 6, 4), 1e5
        expected = torch.eye(3).repeat_interleave(2, 0) - 1 / 3
        longer = torch.cat([support[0], torch.ones(6, 1)], 1)
        # The next term is smaller by ||B|| / decay.
        torch.testing.assert_close(
            fitted(support, 3, decay)[0] * decay, expected.T @ longer / 6, rtol=1e-3, atol=1e-3
        )

    def test_fitted_cosine_heads_tell_their_support_set(self):
        torch.manual_seed(0)
        support = torch.randn(4, 6, 8)
        told = fitted_cosine(support, 3, 0.1)(support).argmax(-1)
        assert (told == torch.tensor([0, 0, 1, 1, 2, 2])).all()
