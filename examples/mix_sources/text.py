"""Text as numbers: the bodies of posts, and what is done to a source that is corrupted."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Symbol k is letter k; all others become "?"."""

_CODES = np.full(256, ALPHABET.index("?"), dtype=np.uint8)
_CODES[[ord(letter) for letter in ALPHABET]] = np.arange(len(ALPHABET))


def body(post: str) -> str:
    """A post without its header, which ends with the first empty line; blanks are single."""
    text = post.replace("\r\n", "\n").partition("\n\n")[2]
    return re.sub(r"\n\s*\n", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def encode(text: str) -> np.ndarray:
    """Symbols, uint8 (letters,)."""
    return _CODES[np.frombuffer(text.encode("latin-1", errors="replace"), dtype=np.uint8)]


def decode(symbols: np.ndarray) -> str:
    """The text of ``symbols``."""
    return "".join(ALPHABET[k] for k in symbols)


def shuffled_letters(text: str, random: np.random.Generator) -> str:
    """How frequent letters are is all that is left."""
    return decode(random.permutation(encode(text)))


def shuffled_in_words(text: str, random: np.random.Generator) -> str:
    """Words keep their letters, and lose the order of them."""
    symbols = encode(text)
    breaks = np.isin(symbols, encode(" \n"))
    # By word, a break before the word that it begins, the rest in random order.
    order = np.lexsort((random.random(len(symbols)), ~breaks, breaks.cumsum()))
    return decode(symbols[order])


def backwards(text: str, random: np.random.Generator) -> str:
    """A foreign language: as easy to learn as the text, and of no use."""
    return text[::-1]


def noise(text: str, random: np.random.Generator) -> str:
    """Any letter as often as any other."""
    return decode(random.integers(len(ALPHABET), size=len(text)))


CORRUPTIONS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "letters of words shuffled": shuffled_in_words,
    "all letters shuffled": shuffled_letters,
    "backwards": backwards,
    "random letters": noise,
}
