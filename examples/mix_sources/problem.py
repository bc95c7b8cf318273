"""The data of ``mix_sources``: ten sources of text, and two small sets of the text that is wanted.

The text that is wanted is on science (20 Newsgroups, ``sci.*``, test posts). Sources are made of
training posts: four of science, two of other subjects, and four of yet other subjects that are
corrupted, each in its own way. A seed draws which subjects these are.

Posts quote each other and carry signatures, so that a few windows of the held-out text occur letter
by letter in a source as well, for all rows alike.

Words in random order are not among the corruptions, because they do teach spelling: a model of
letters is right to use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.data.mirrors import default_folder
from examples.data.newsgroups import raw_posts
from examples.mix_sources.text import CORRUPTIONS, body, encode

WANTED = "sci."
BINARIES = "comp.os.ms-windows.misc"  # its posts hold encoded files
OTHERS = 2
LENGTH = 400_000  # letters of a source, at most
CLEAN_LENGTH, TEST_LENGTH = 20_000, 65_536

Bodies = dict[str, list[str]]


class Mixture(NamedTuple):
    """Sources (K, letters) and the wanted text, (letters,) each; symbols, int64."""

    names: list[str]
    kinds: list[str]
    """Of each source: "wanted", "other" or "corrupted"."""
    sources: Tensor
    clean: Tensor
    """What f sees."""
    test: Tensor
    """What nobody sees."""
    seed: int

    def of_kind(self, *kinds: str) -> Tensor:
        """Which sources are, a mask (K,)."""
        return torch.tensor([kind in kinds for kind in self.kinds])

    def to(self, device: torch.device) -> Mixture:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("sources", "clean", "test")}
        return self._replace(**moved)


def load(data_dir: Path | None) -> tuple[Bodies, Bodies]:
    """Bodies of the (training, test) posts of each group; those of binaries are left out."""
    found: list[Bodies] = []
    for posts, groups in raw_posts(default_folder("20newsgroups", data_dir)):
        bodies: Bodies = {}
        for post, group in zip(posts, groups, strict=True):
            if group != BINARIES:
                bodies.setdefault(group, []).append(body(post))
        found.append(bodies)
    return found[0], found[1]


def make_mixture(data: tuple[Bodies, Bodies], seed: int) -> Mixture:
    """The sources and the wanted text of a seed.

    Args:
        data: bodies of the training and the test posts.
        seed: draws the groups, the order of posts and the corruptions.

    Raises:
        SystemExit: there are too few groups, or a source is empty.
    """
    random = np.random.default_rng(seed)
    train, test = data
    wanted = sorted(group for group in train if group.startswith(WANTED))
    rest = sorted(set(train) - set(wanted))
    if not wanted or len(rest) < OTHERS + len(CORRUPTIONS):
        raise SystemExit(f"the sources need {WANTED}* and 6 other groups, found {sorted(train)}")
    drawn = iter(random.permutation(rest).tolist())
    texts = list(_texts(train, wanted, drawn, random))
    length = min(LENGTH, *(len(text) for _, _, text in texts))
    target = _joined([post for group in wanted for post in test[group]], random)
    symbols = torch.from_numpy(encode(target)).long()
    clean = min(CLEAN_LENGTH, len(symbols) // 2)
    return Mixture(
        names=[name for name, _, _ in texts],
        kinds=[kind for _, kind, _ in texts],
        sources=torch.stack([torch.from_numpy(encode(t)[:length]).long() for _, _, t in texts]),
        clean=symbols[:clean],
        test=symbols[clean : clean + TEST_LENGTH],
        seed=seed,
    )


def _texts(
    train: Bodies, wanted: list[str], drawn: Iterator[str], random: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """(Name, kind, text) of every source."""
    for group in wanted:
        yield group, "wanted", _joined(train[group], random)
    for _ in range(OTHERS):
        group = next(drawn)
        yield group, "other", _joined(train[group], random)
    for how, corrupt in CORRUPTIONS.items():
        group = next(drawn)
        text = _joined(train[group], random)
        yield f"{group}, {how}", "corrupted", corrupt(text, random)


def _joined(posts: list[str], random: np.random.Generator) -> str:
    """All posts in a random order."""
    return "\n\n".join(posts[k] for k in random.permutation(len(posts)))
