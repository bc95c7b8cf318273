"""The data sets of the examples from the real files, where these lie beside the checkout."""

import io
import zipfile

import numpy as np
import pytest
import torch

for library in ("PIL", "pooch", "requests", "tqdm"):
    pytest.importorskip(library)

from PIL import Image  # noqa: E402
from tiny_data import cache_in  # noqa: E402

from examples.data import cifar10, images, miniimagenet, mirrors, omniglot  # noqa: E402
from examples.data.mnist import mnist  # noqa: E402

if not mirrors.BESIDE.is_dir():
    pytest.skip("the data sets are not beside the checkout", allow_module_level=True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    cache_in(monkeypatch, tmp_path)


def moments(images):
    """Mean and deviation of each channel of (N, C, H, W)."""
    return images.mean((0, 2, 3)), images.std((0, 2, 3))


def test_mnist_has_the_moments_that_are_known():
    rows, labels = mnist(mirrors.default_folder("mnist"))
    mean, deviation = moments(rows[:60000].view(-1, 1, 28, 28))
    assert mean.item() == pytest.approx(0.1307, abs=1e-4)
    assert deviation.item() == pytest.approx(0.3081, abs=1e-4)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_cifar10_has_the_moments_that_are_known():
    train, test = cifar10.cifar10(mirrors.default_folder("cifar10"))
    for part in (train, test):
        assert part.images.shape == (10000, 3, 32, 32)
        assert part.labels.bincount().tolist() == [1000] * 10
    # Of all 50,000. An image's mean varies by 0.12, so that of 10,000 by 0.0012; channels differ
    # by ten times the bound.
    mean, deviation = moments(images.to_float(train.images))
    torch.testing.assert_close(
        mean, torch.tensor([0.4914, 0.4822, 0.4465]).float(), rtol=0, atol=4e-3
    )
    torch.testing.assert_close(
        deviation, torch.tensor([0.2470, 0.2435, 0.2616]).float(), rtol=0, atol=4e-3
    )


def test_omniglot_from_original_zips_is_bit_equal_to_the_bits():
    folder = mirrors.default_folder("omniglot")
    whole = omniglot.omniglot(folder)
    assert whole.bits.shape == (1623, 20, 28, 28)
    assert whole.is_evaluation.sum() == 659
    place = {name: i for i, name in enumerate(whole.names)}
    count = 0
    for small in ("images_background_small1.zip", "images_background_small2.zip"):
        bits, names = omniglot.read(folder / small)
        chosen = [place[name] for name in names]
        assert torch.equal(torch.from_numpy(bits), whole.bits[chosen])
        assert not whole.is_evaluation[chosen].any()
        count += bits.shape[0] * bits.shape[1]
    assert count == 5840


def test_mini_imagenet_first_images_of_each_class():
    folder = mirrors.default_folder("miniimagenet")
    archive = folder / "miniimagenet_first100perclass.zip"
    for split, classes in {"train": 64, "val": 16, "test": 20}.items():
        found = miniimagenet.miniimagenet(folder, split, 2)
        assert found.images.shape == (classes, 2, 3, 84, 84)
        with zipfile.ZipFile(archive) as file:
            for name, mine in zip(found.names, found.images, strict=True):
                listed = [n for n in file.namelist() if n.startswith(f"{split}/{name}/")]
                picture = Image.open(io.BytesIO(file.read(listed[1])))
                assert np.array_equal(mine[1].permute(1, 2, 0).numpy(), np.asarray(picture))
    with pytest.raises(ValueError, match="has 100 images of"):
        miniimagenet.miniimagenet(folder, "val", 101)
