"""The data of ``denoise``: noisy training images, a few clean ones, and the networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.data.cifar10 import cifar10
from examples.data.images import LabelledImages, to_float
from examples.data.mirrors import default_folder
from examples.data.mnist import mnist
from examples.data.svhn import svhn

CLASSES = 10
MODELS = ("linear", "tanh", "mlp", "cnn")
GREY = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)  # ITU-R 601, as published for SVHN


class Problem(NamedTuple):
    """Images (N, C, H, W) in [0, 1]; ``labels`` are given, ``truth`` is hidden."""

    images: Tensor
    labels: Tensor
    truth: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    model: str
    seed: int

    @property
    def is_right(self) -> Tensor:
        """Which given labels are the true ones."""
        return self.labels == self.truth

    def to(self, device: torch.device) -> Problem:
        """The same on another device."""
        return self._replace(
            **{k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        )


Data = tuple[LabelledImages, LabelledImages | None]


def load(dataset: str, data_dir: Path | None) -> Data:
    """(Training, test) images of a data set, uint8, and their true labels.

    scikit-learn's digits have no test images of their own: None.
    """
    if dataset == "digits":
        rows, labels = load_digits(return_X_y=True)  # 0 to 16
        images = (torch.from_numpy(rows) * (255 / 16)).round().to(torch.uint8)
        return LabelledImages(images.reshape(-1, 1, 8, 8), torch.from_numpy(labels)), None
    folder = default_folder(dataset, data_dir)
    if dataset == "mnist":
        rows, labels = mnist(folder)
        images = (rows * 255).round().to(torch.uint8).reshape(-1, 1, 28, 28)
        return LabelledImages(images[:60000], labels[:60000]), LabelledImages(
            images[60000:], labels[60000:]
        )
    return {"cifar10": cifar10, "svhn": svhn}[dataset](folder)


def make_problem(
    data: Data,
    seed: int,
    *,
    model: str,
    train: int,
    clean: int,
    noise: float,
    flip: str,
    grey: bool = False,
) -> Problem:
    """``train`` images, a share ``noise`` of them with a wrong label, and ``clean`` others.

    Args:
        data: training and test images; without these the images that are left over are for tests.
        seed: draws the images and the noise.
        model: name of the network.
        train: number of noisy images.
        clean: number of clean ones, equally many of each class.
        noise: share of wrong labels.
        flip: "uniform": a wrong label is any of the other nine, as published; "pair": it is the
            next class.
        grey: colours to grey.
    """
    (images, truth), test = data
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(truth), generator=generator)
    order = order[_balanced_first(truth[order], clean)]
    if train + clean + (test is None) > len(order):
        raise SystemExit(
            f"--train {train} and --clean {clean} ask for more than the {len(order)} images there"
        )
    first, rest = order[:clean], order[clean : clean + train]
    if test is None:
        test = LabelledImages(images[order[clean + train :]], truth[order[clean + train :]])
    wrong = torch.randperm(train, generator=generator) < round(noise * train)
    shift = torch.randint(1, CLASSES, (train,), generator=generator)
    if flip == "pair":
        shift = torch.ones_like(shift)
    labels = torch.where(wrong, (truth[rest] + shift) % CLASSES, truth[rest])

    def prepared(chosen: Tensor) -> Tensor:
        values = to_float(chosen).to(torch.get_default_dtype())
        return (values * GREY).sum(1, keepdim=True) if grey else values

    return Problem(
        *(prepared(images[rest]), labels, truth[rest], prepared(images[first]), truth[first]),
        *(prepared(test.images), test.labels, model, seed),
    )


def _balanced_first(labels: Tensor, count: int) -> Tensor:
    """An order whose first ``count`` places hold each class equally often."""
    rank = torch.zeros_like(labels)
    for label in range(CLASSES):
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    return torch.argsort((rank >= count // CLASSES).long(), stable=True)


def make_model(problem: Problem, seed: int) -> nn.Module:
    """A fresh network of ``MODELS``.

    "tanh" has 64 hidden units, "mlp" 300 with ReLU, "cnn" is the published one of the data set.

    The published CNNs are built with dropout, but their code never turns it on; so they have none
    here.
    """
    channels, side = problem.images.shape[1], problem.images.shape[2]
    torch.manual_seed(seed)
    if problem.model == "linear":
        net = nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, CLASSES))
    elif problem.model == "tanh":
        net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(channels * side**2, 64), nn.Tanh()), nn.Linear(64, CLASSES)
        )
    elif problem.model == "mlp":
        net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(channels * side**2, 300), nn.ReLU()),
            nn.Linear(300, CLASSES),
        )
    elif side == 28:  # MNIST
        net = _cnn(channels, [(64, 5, 0), "pool", (128, 5, 0), "pool"], 128 * 16, (512, 256))
    elif channels == 1:  # SVHN, grey
        blocks = [(width, 3, 1) for width in (32, 64, 128) for _ in range(2)]
        layers = [*blocks[:2], "pool", *blocks[2:4], "pool", *blocks[4:], "pool"]
        net = _cnn(channels, layers, 128 * 16, (512,))
    else:  # CIFAR-10
        layers = [x for w in (48, 96, 192) for x in ((w, 3, 1), (w, 3, 0), "pool")]
        net = _cnn(channels, layers, 192 * 4, (512, 256))
    return net.to(problem.images.device)


def _cnn(
    channels: int,
    layers: Sequence[tuple[int, int, int] | str],
    flat: int,
    hidden: Sequence[int],
) -> nn.Sequential:
    """Convolutions (width, kernel, padding) with ReLU, halvings, then fully connected layers."""
    found: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, str):
            found.append(nn.MaxPool2d(2))
        else:
            width, kernel, padding = layer
            found += [nn.Conv2d(channels, width, kernel, padding=padding), nn.ReLU()]
            channels = width
    found.append(nn.Flatten())
    for width in hidden:
        found += [nn.Linear(flat, width), nn.ReLU()]
        flat = width
    return nn.Sequential(*found, nn.Linear(flat, CLASSES))
