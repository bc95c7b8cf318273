"""The frozen features of ``clean_label``: a small network, trained here on other classes.

Images are halved to 42 x 42 pixels. Four blocks of convolution, batch norm, ReLU and pooling leave
128 channels at 2 x 2 places: 512 numbers, so that a linear model of some 120 images can fit each
of them, as with the published 2,048. They are scaled to ||phi||^2 = 100 on average. What was
trained is kept in the user's cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from tqdm import tqdm

from examples.data.cache import Arrays, cached
from examples.data.images import to_float
from examples.data.miniimagenet import ZIPS, miniimagenet

SIDE = 42
WIDTHS = (32, 64, 128, 128)
RATE = 2e-3
BATCH = 64


def halved(images: Tensor) -> Tensor:
    """From uint8 (N, 3, H, W) to float32 in [0, 1], 42 x 42."""
    parts = [adaptive_avg_pool2d(to_float(part), SIDE) for part in images.split(256)]
    return torch.cat(parts)


class Features(nn.Module):
    """Images in [0, 1] (N, 3, 42, 42) to 512 numbers."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """The features."""
        return self.layers(2 * images - 1).flatten(1) / self.scale


def features(folder: Path, classes: int, per_class: int, epochs: int) -> Features:
    """Trained on the first classes of mini-ImageNet's training split; frozen.

    Args:
        folder: of mini-ImageNet.
        classes: how many of its 64.
        per_class: images of each.
        epochs: of training by Adam, the rate falling along a cosine.
    """

    def train() -> Arrays:
        found = miniimagenet(folder, "train", per_class).images[:classes]
        labels = torch.arange(classes).repeat_interleave(per_class)
        state = _trained(halved(found.flatten(0, 1)), labels, epochs).state_dict()
        return {name: value.numpy() for name, value in state.items()}

    archive = next((folder / name for name in ZIPS if (folder / name).exists()), None)
    if archive is None:
        miniimagenet(folder, "train", 1)  # says what is missing
        raise AssertionError
    arrays = cached(archive, f"conv4-{classes}-{per_class}-{epochs}", train)
    net = Features()
    net.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()})
    return net.eval().requires_grad_(False)


def _trained(images: Tensor, labels: Tensor, epochs: int) -> Features:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Features()
        head = nn.Linear(4 * WIDTHS[-1], int(labels.max()) + 1)
        rule = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=RATE)
        steps = epochs * -(-len(labels) // BATCH)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps)
        with tqdm(total=steps, desc="features", leave=False) as bar:
            for _ in range(epochs):
                for rows in torch.randperm(len(labels)).split(BATCH):
                    batch = images[rows]
                    batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
                    rule.zero_grad()
                    loss = cross_entropy(head(net(batch)), labels[rows])
                    loss.backward()
                    rule.step()
                    falling.step()
                    bar.update()
                    bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    net.eval()
    with torch.no_grad():
        outputs = torch.cat([net(part) for part in images.split(512)])
        net.scale.copy_(outputs.square().sum(1).mean().sqrt() / 10)
    return net
