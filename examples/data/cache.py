"""What takes long to decode is kept in the user's cache, as arrays."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch

from examples.data.mirrors import user_cache

Arrays = dict[str, np.ndarray]


def cached(archive: Path, content: str, make: Callable[[], Arrays]) -> Arrays:
    """What ``make`` returns, made once per archive and ``content``.

    Args:
        archive: the file that ``make`` reads; its size and its SHA-256 are part of the key.
        content: what of the archive is made, and how. Change it when ``make`` changes.
        make: returns numeric arrays by name.

    A cache that cannot be read is made again; one that cannot be written is reported and left.
    """
    digest = pooch.file_hash(str(archive), "sha256")
    name = f"{archive.stem}-{archive.stat().st_size}-{digest[:16]}-{content}.npz"
    path = user_cache() / "decoded" / name
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = make()
    try:
        _write(path, arrays)
    except OSError as error:
        print(f"{archive.name} will be decoded again next time: {error}", file=sys.stderr)
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    """All or nothing: another process may read or write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
