"""Each data set of the examples from a small file in its format."""

import io
import itertools
import pickle

import numpy as np
import pytest
import torch

for library in ("PIL", "pooch", "requests", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(library)

from scipy.io import savemat  # noqa: E402
from tiny_data import (  # noqa: E402
    as_original,
    cache_in,
    picture,
    pixels,
    python2_pickle,
    same,
    write_idx,
    write_tar,
    write_zip,
)

from examples.data import cifar10, images, mnist, newsgroups, svhn, uci  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    cache_in(monkeypatch, tmp_path)


@pytest.fixture
def random():
    return np.random.default_rng(0)


class TestImages:
    def test_to_float(self):
        found = images.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
        torch.testing.assert_close(found, torch.tensor([0, 0.2, 1], dtype=torch.float32))

    @pytest.mark.parametrize(
        ("shape", "kind", "labels"),
        [((2, 3, 4, 4), "f4", 2), ((2, 4, 4), "u1", 2), ((2, 3, 4, 4), "u1", 3)],
    )
    def test_arrays_of_another_form_are_refused(self, shape, kind, labels):
        with pytest.raises(ValueError, match=r"should be uint8 \(N, C, H, W\)"):
            images.labelled(np.zeros(shape, kind), np.zeros(labels))

    def test_pictures_of_another_size_are_refused(self, random, tmp_path):
        write_zip(tmp_path / "a.zip", {"wide.png": picture(pixels(random, 4, 5, 3))})
        with pytest.raises(ValueError, match=r"wide\.png .* is \(5, 4\), should be 4 x 4"):
            images.rgb(tmp_path / "a.zip", ["wide.png"], 4)


def test_mnist(random, monkeypatch, tmp_path):
    sizes = {"train": 3, "t10k": 2}
    drawn = {name: pixels(random, n, 28, 28) for name, n in sizes.items()}
    digits = {name: random.integers(10, size=n) for name, n in sizes.items()}
    for name in sizes:
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", drawn[name])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", digits[name])
    as_original(monkeypatch, mnist, tmp_path)
    rows, labels = mnist.mnist(tmp_path)
    assert rows.dtype == torch.float32
    together = np.concatenate([drawn["train"], drawn["t10k"]])
    same(rows.view(-1, 28, 28), together.astype(np.float32) / np.float32(255))
    same(labels, np.concatenate([digits["train"], digits["t10k"]]))


def test_uci(tmp_path):
    table = np.array([[1.5, 2, 10], [3, 4, 30], [5, 6.25, 20], [7, 8, 40]])
    np.savetxt(tmp_path / "treforevans_gas.csv.gz", table, delimiter=",")
    columns, labels = uci.uci("gas", tmp_path)
    assert columns.tolist() == table[:, :2].tolist()
    assert labels.tolist() == [0, 1, 0, 1]  # the median is 25


def test_newsgroups(tmp_path):
    posts = {"train/b/1": b"pear pear apple", "train/a/2": b"apple", "train/b/3": b"plum pear"}
    posts["test/b/4"] = b"pear the apple \xe9"
    members = {f"20news-bydate-{name}": content for name, content in posts.items()}
    write_tar(tmp_path / newsgroups.ARCHIVE, members)
    train, groups, test, test_groups = newsgroups.newsgroups(tmp_path, 2)
    assert (groups.tolist(), test_groups.tolist()) == ([1, 0, 1], [1])
    # Words: apple, pear, each in 2 of 3 posts, so that their weights are equal.
    many = 1 + np.log(2)
    rows = np.array([[1, many], [1, 0], [0, 1]])
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(train.toarray(), expected, rtol=1e-14)
    np.testing.assert_allclose(test.toarray(), [[0.5**0.5, 0.5**0.5]], rtol=1e-14)


class TestCifar10:
    def members(self, random):
        """Two images a batch, not in order; (pixels, labels) in order."""
        names = [*cifar10.BATCHES["train"], *cifar10.BATCHES["test"]]
        data = {name: pixels(random, 2, 3072) for name in names}
        labels = {name: random.integers(10, size=2).tolist() for name in names}
        packed = {
            f"cifar-10-batches-py/{name}": python2_pickle(
                {
                    "batch_label": f"batch {name}",
                    "data": data[name],
                    "labels": labels[name],
                    "filenames": ["a_s_000001.png", "b_s_000002.png"],
                }
            )
            for name in reversed(names)
        }
        packed["cifar-10-batches-py/readme.html"] = b"<html>"
        joined = [np.concatenate([part[name] for name in names]) for part in (data, labels)]
        return packed, *joined

    def write_archive(self, random, monkeypatch, folder):
        packed, data, labels = self.members(random)
        write_tar(folder / cifar10.ARCHIVE, packed)
        as_original(monkeypatch, cifar10, folder)
        return data, labels

    def write_zip(self, random, folder):
        """One image of each class and split, by name."""
        drawn = {
            f"{split}/{name}/x_s_{place:06d}.png": pixels(random, 32, 32, 3)
            for split in ("train", "test")
            for place, name in enumerate(cifar10.CLASSES)
        }
        # Not in order.
        write_zip(folder / cifar10.ZIP, {k: picture(drawn[k]) for k in reversed(drawn)})
        return drawn

    def test_batches_of_python_2(self, random, monkeypatch, tmp_path):
        data, labels = self.write_archive(random, monkeypatch, tmp_path)
        train, test = cifar10.cifar10(tmp_path)
        assert len(train.images) == 10
        found = torch.cat([train.images, test.images])
        assert found.shape == (12, 3, 32, 32)
        for place in itertools.product((0, 5, 11), (0, 2), (0, 13, 31), (0, 30)):
            image, channel, row, column = place
            assert found[place] == data[image, 1024 * channel + 32 * row + column]
        same(torch.cat([train.labels, test.labels]), labels)

    def test_pictures(self, random, tmp_path):
        drawn = self.write_zip(random, tmp_path)
        for _ in ("decoded", "from the cache"):
            found = cifar10.cifar10(tmp_path)
            for split, part in zip(("train", "test"), found, strict=True):
                mine = [value for name, value in drawn.items() if name.startswith(split)]
                same(part.images.permute(0, 2, 3, 1), np.stack(mine))
                assert part.labels.tolist() == list(range(10))

    def test_the_whole_set_goes_before_its_part(self, random, monkeypatch, tmp_path):
        self.write_zip(random, tmp_path)
        _, labels = self.write_archive(random, monkeypatch, tmp_path)
        same(cifar10.cifar10(tmp_path)[0].labels, labels[:10])

    def test_a_pickle_that_would_run_something_is_refused(self, tmp_path):
        mark = tmp_path / "was run"

        class Evil:
            def __reduce__(self):
                return (open, (str(mark), "w"))

        for content in (pickle.dumps(Evil(), 2), b"cos\nsystem\n(S'touch x'\ntR."):
            with pytest.raises(pickle.UnpicklingError, match="is no part of an array"):
                cifar10.read_pickle(io.BytesIO(content))
        assert not mark.exists()


class TestSvhn:
    def write(self, path, drawn, labels):
        """(N, 32, 32, 3) as MATLAB has it."""
        savemat(path, {"X": drawn.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)})

    def test_files_of_matlab(self, random, monkeypatch, tmp_path):
        drawn = {"train": pixels(random, 4, 32, 32, 3), "test": pixels(random, 3, 32, 32, 3)}
        labels = {"train": np.array([1, 10, 9, 10]), "test": np.array([10, 2, 5])}
        for name in drawn:
            self.write(tmp_path / f"{name}_32x32.mat", drawn[name], labels[name])
        as_original(monkeypatch, svhn, tmp_path)
        train, test = svhn.svhn(tmp_path)
        same(train.images.permute(0, 2, 3, 1), drawn["train"])
        same(test.images.permute(0, 2, 3, 1), drawn["test"])
        assert train.images.is_contiguous()
        same(train.labels, np.array([1, 0, 9, 0]))
        same(test.labels, np.array([0, 2, 5]))

    @pytest.mark.parametrize(("side", "label"), [(32, 0), (32, 11), (28, 1)])
    def test_other_arrays_are_refused(self, random, side, label, tmp_path):
        self.write(tmp_path / "a.mat", pixels(random, 1, side, side, 3), np.array([label]))
        with pytest.raises(ValueError, match="is not of SVHN's cropped digits"):
            svhn.read(tmp_path / "a.mat")
