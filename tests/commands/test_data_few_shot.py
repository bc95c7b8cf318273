"""The data sets of few-shot learning and Dogfish, from small files in their formats."""

import io
import itertools

import numpy as np
import pytest

for library in ("PIL", "pooch", "requests", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(library)

from PIL import Image  # noqa: E402
from tiny_data import as_original, cache_in, picture, pixels, same, write_zip  # noqa: E402

from benchmarks.race import omniglot as omniglot_race  # noqa: E402
from examples.data import dogfish, miniimagenet, omniglot  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    cache_in(monkeypatch, tmp_path)


@pytest.fixture
def random():
    return np.random.default_rng(0)


class TestOmniglot:
    def write(self, random, folder):
        """Two zips as the originals; ink (105, 105) by character and drawer."""
        alphabets = {"background": ["Zulu", "Braille"], "evaluation": ["Mkhedruli"]}
        ink = {}
        for part, names in alphabets.items():
            members = {f"images_{part}/": b""}
            for alphabet, character in itertools.product(names, (2, 1)):
                name = f"{alphabet}/character{character:02d}"
                ink[name] = random.random((20, 105, 105)) < 0.5
                for drawer in reversed(range(20)):
                    path = f"images_{part}/{name}/{character:04d}_{drawer + 1:02d}.png"
                    members[path] = picture(~ink[name][drawer])  # paper is 1
            write_zip(folder / f"images_{part}.zip", members)
        return ink

    def test_zips_by_the_nearest_pixel(self, random, monkeypatch, tmp_path):
        ink = self.write(random, tmp_path)
        as_original(monkeypatch, omniglot, tmp_path)
        nearest = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
        for _ in ("decoded", "from the cache"):
            found = omniglot.omniglot(tmp_path)
            assert found.names == tuple(sorted(ink))
            for name, bits, held_out in zip(*found[1::-1], found.is_evaluation, strict=True):
                same(bits, ink[name][:, nearest][:, :, nearest])
                assert held_out == name.startswith("Mkhedruli")
        averaged, _ = omniglot_race.load(tmp_path)
        assert averaged.shape == (6, 20, 1, 14, 14)
        assert averaged[2, 3, 0, 5, 6] == found.bits[2, 3, 10:12, 12:14].float().mean()

    def test_bits(self, random, tmp_path):
        bits = random.random((3, 20, 28, 28)) < 0.5
        packed = np.packbits(bits.reshape(3, 20, -1), axis=-1)
        names, held_out = np.array(["A/1", "A/2", "B/1"]), np.array([True, True, False])
        path = tmp_path / omniglot.BITS
        np.savez(path, bits=packed, classes=names, is_evaluation=held_out)
        found = omniglot.omniglot(tmp_path)
        same(found.bits, bits)
        assert found.names == ("A/1", "A/2", "B/1")
        same(found.is_evaluation, held_out)

    def test_a_character_that_lacks_a_drawer_is_refused(self, random, tmp_path):
        members = {f"x/A/character01/01_{i:02d}.png": b"" for i in range(1, 20)}
        write_zip(tmp_path / "a.zip", members)
        with pytest.raises(ValueError, match=r"A/character01 of .* has not 20 images"):
            omniglot.read(tmp_path / "a.zip")


class TestMiniImageNet:
    LISTED = ("n02", 3), ("n01", 4)  # the list is not in alphabetical order

    def write(self, random, monkeypatch, folder, left_out=()):
        """A zip and three lists of two classes; JPEG files by name."""
        content = {}
        for split in miniimagenet.SPLITS:
            lines = ["filename,label"]
            for label, count in self.LISTED:
                for place in range(count):
                    name = f"{label}{split}{place}.jpg"
                    lines.append(f"{name},{label}")
                    content[name] = picture(pixels(random, 84, 84, 3), "JPEG")
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        kept = {name: value for name, value in content.items() if name not in left_out}
        # Folders and order do not count.
        write_zip(
            folder / miniimagenet.ZIPS[0],
            {f"any/{name}": kept[name] for name in reversed(kept)},
        )
        as_original(monkeypatch, miniimagenet, folder, "LISTS")
        return content

    def decoded(self, content, names):
        return np.stack([np.asarray(Image.open(io.BytesIO(content[name]))) for name in names])

    def test_first_images_of_each_class(self, random, monkeypatch, tmp_path):
        content = self.write(random, monkeypatch, tmp_path)
        for split, count in (("train", 2), ("test", None), ("train", 1), ("val", 2)):
            found = miniimagenet.miniimagenet(tmp_path, split, count)
            assert found.names == ("n01", "n02")
            for label, mine in zip(found.names, found.images, strict=True):
                names = [f"{label}{split}{place}.jpg" for place in range(count or 3)]
                same(mine.permute(0, 2, 3, 1), self.decoded(content, names))

    def test_images_that_the_zip_lacks(self, random, monkeypatch, tmp_path):
        content = self.write(random, monkeypatch, tmp_path, ["n02val0.jpg"])
        found = miniimagenet.miniimagenet(tmp_path, "val").images[1]
        names = ["n02val1.jpg", "n02val2.jpg"]
        same(found.permute(0, 2, 3, 1), self.decoded(content, names))
        for wrong in (3, 0, -1):
            with pytest.raises(ValueError, match=f"per_class={wrong}: .* has 2 images of n02"):
                miniimagenet.miniimagenet(tmp_path, "val", wrong)
        with pytest.raises(ValueError, match="split='validation' is none of train, val, test"):
            miniimagenet.miniimagenet(tmp_path, "validation")

    def test_without_the_zip_it_says_what_to_put_where(self, tmp_path):
        with pytest.raises(SystemExit) as caught:
            miniimagenet.miniimagenet(tmp_path, "val")
        parts = ("research only", str(tmp_path), "miniimagenet.zip", "val.csv")
        assert all(part in str(caught.value) for part in parts)


class TestDogfish:
    def write(self, folder, drawn, labels, kind):
        scaled = {f"X_{k}": ((v / 255 - 0.5) * 2).astype(kind) for k, v in drawn.items()}
        none = {"X_valid": np.zeros((0, 6, 6, 3)), "Y_valid": np.zeros(0)}
        given = {f"Y_{k}": np.array(v, float) for k, v in labels.items()}
        np.savez_compressed(folder / dogfish.FILE, **scaled, **given, **none)

    @pytest.mark.parametrize("kind", ["f8", "f4"])
    def test_scaled_pixels(self, random, kind, tmp_path):
        drawn = {"train": pixels(random, 5, 6, 6, 3), "test": pixels(random, 2, 6, 6, 3)}
        drawn["train"][0, 0, :2, 0] = 0, 255
        labels = {"train": [0, 1, 1, 0, 1], "test": [1, 0]}
        self.write(tmp_path, drawn, labels, kind)
        for _ in ("read", "from the cache"):
            for part, name in zip(dogfish.dogfish(tmp_path), drawn, strict=True):
                same(part.images.permute(0, 2, 3, 1), drawn[name])
                assert part.labels.tolist() == labels[name]

    @pytest.mark.parametrize(
        ("values", "labels", "said"),
        [
            (np.full((1, 6, 6, 3), 1 + 2 / 255), [0], "no pixels scaled"),
            (np.full((1, 6, 6, 3), -1 - 2 / 255), [0], "no pixels scaled"),
            (np.full((1, 6, 6, 3), 0.25), [0], "no pixels scaled"),
            (np.full((1, 6, 6, 3), np.nan), [0], "no pixels scaled"),
            (np.zeros((1, 6, 6, 3), np.uint8), [0], r"uint8 \(1, 6, 6, 3\), should be float"),
            (np.zeros((1, 6, 6)), [0], r"should be float \(N, H, W, 3\)"),
            (np.ones((1, 6, 6, 3)), [2], "neither 0 nor 1"),
        ],
    )
    def test_other_arrays_are_refused(self, values, labels, said, tmp_path):
        parts = {"X_train": values, "X_test": values, "Y_train": labels, "Y_test": labels}
        np.savez(tmp_path / dogfish.FILE, **parts)
        with pytest.raises(ValueError, match=said):
            dogfish.dogfish(tmp_path)

    def test_without_the_file_it_says_what_to_put_where(self, tmp_path):
        with pytest.raises(SystemExit) as caught:
            dogfish.dogfish(tmp_path)
        parts = (dogfish.FILE, dogfish.ADDRESS, str(tmp_path), "research only")
        assert all(part in str(caught.value) for part in parts)
