"""Tiny few-shot problems in double precision: 16 x 16 pixels, encoders of 4 channels."""

import torch

from examples.few_shot.encoders import Conv4
from examples.few_shot.formulation import FewShot
from examples.few_shot.learner import Setting
from examples.few_shot.problem import Images, Size
from torch_penalty_bilevel.nn import StackedHeads

SIZE, TASKS, WIDTH, DECAY = Size(ways=3, shots=2, queries=4), 2, 4, 0.3


def encoder(seed=0):
    torch.manual_seed(seed)
    return Conv4(1, WIDTH).double()


def images(seed=0, size=SIZE, tasks=TASKS):
    """Of a meta-batch; those of a class are alike."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.rand(tasks * size.ways, 1, 1, 16, 16, generator=generator, dtype=torch.double)
    each = size.shots + size.queries
    noise = torch.rand(len(classes), each, 1, 16, 16, generator=generator, dtype=torch.double)
    drawn = (classes + noise) / 2
    return Images(drawn[:, : size.shots].flatten(0, 1), drawn[:, size.shots :].flatten(0, 1))


def setting(seed=0, cosine=False):
    return Setting(encoder(seed), WIDTH, SIZE, TASKS, cosine)


def bilevel(cosine=False):
    heads = StackedHeads(TASKS, WIDTH, SIZE.ways, cosine=cosine, dtype=torch.double)
    return FewShot(encoder(), heads, DECAY)
