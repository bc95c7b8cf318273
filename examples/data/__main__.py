"""Are the data there, and are they right? Reads data sets and prints what was found.

    python -m examples.data mnist
    python -m examples.data cifar10 omniglot --data-dir ~/data

A data set NAME is looked for in DIR/NAME with --data-dir DIR; else in ../shared/data/NAME beside
the checkout; else in the user's cache, into which it is downloaded where that is allowed. For each
it prints source and licence, the files of the folder, and per array its type, shape, range and the
start of the SHA-256 of its bytes. Pictures are decoded once and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from examples.data import cifar10, dogfish, miniimagenet, mnist, newsgroups, omniglot, svhn, uci
from examples.data.images import LabelledImages
from examples.data.mirrors import default_folder
from examples.shared import command

Found = dict[str, Any]


def _split(parts: tuple[LabelledImages, LabelledImages]) -> Found:
    return {
        f"{split} {field}": value
        for split, part in zip(("train", "test"), parts, strict=True)
        for field, value in part._asdict().items()
    }


def _mnist(folder: Path) -> Found:
    return dict(zip(("images", "labels"), mnist.mnist(folder), strict=True))


def _newsgroups(folder: Path) -> Found:
    names = "train rows", "train groups", "test rows", "test groups"
    return dict(zip(names, newsgroups.newsgroups(folder, 2000), strict=True))


def _uci(folder: Path) -> Found:
    found: Found = {}
    for name in uci.UCI:
        found[f"{name} columns"], found[f"{name} labels"] = uci.uci(name, folder)
    return found


def _miniimagenet(folder: Path) -> Found:
    parts = {split: miniimagenet.miniimagenet(folder, split) for split in miniimagenet.SPLITS}
    return {
        f"{split} {field}": value
        for split, part in parts.items()
        for field, value in part._asdict().items()
    }


SETS: dict[str, tuple[Any, Callable[[Path], Found]]] = {
    "20newsgroups": (newsgroups, _newsgroups),
    "cifar10": (cifar10, lambda folder: _split(cifar10.cifar10(folder))),
    "dogfish": (dogfish, lambda folder: _split(dogfish.dogfish(folder))),
    "miniimagenet": (miniimagenet, _miniimagenet),
    "mnist": (mnist, _mnist),
    "omniglot": (omniglot, lambda folder: omniglot.omniglot(folder)._asdict()),
    "svhn": (svhn, lambda folder: _split(svhn.svhn(folder))),
    "uci": (uci, _uci),
}


def described(value: Any) -> str:
    """One array, or the names of classes, in a line."""
    if isinstance(value, tuple):
        return f"{len(value)} names, {value[0]} to {value[-1]}"
    numbers = value.data if hasattr(value, "nnz") else np.asarray(value)
    classes = ""
    if numbers.dtype == np.int64:
        classes = f", {len(np.unique(numbers))} classes"
    digest = hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()[:16]
    low, high = numbers.min(), numbers.max()
    return f"{numbers.dtype} {(*value.shape,)}, {low:g} to {high:g}{classes}, sha256 {digest}"


def main() -> None:
    """The command."""
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("names", nargs="+", choices=SETS, metavar="NAME", help=", ".join(SETS))
    where = "with a folder per data set"
    parser.add_argument("--data-dir", type=command.folder, metavar="DIR", help=where)
    options = parser.parse_args()
    for name in options.names:
        module, read = SETS[name]
        folder = default_folder(name, options.data_dir)
        try:
            found = read(folder)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
        print(f"{name}: {module.__doc__}\nin {folder}:")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest = pooch.file_hash(str(path), "sha256")
            print(f"  {path.relative_to(folder)}, {path.stat().st_size} bytes, sha256 {digest}")
        print("read:")
        for field, value in found.items():
            print(f"  {field}: {described(value)}")
        print()


if __name__ == "__main__":
    main()
