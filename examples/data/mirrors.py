"""Where data sets lie: a folder of the user's, one beside the checkout, else a download by hash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pooch
import requests

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


class Mirror(NamedTuple):
    """Where files can be had, and the SHA-256 of each."""

    address: str
    """Of the folder; ends in a slash."""
    hashes: dict[str, str]
    """From a file's name to ``sha256:`` and its hash."""


def user_cache() -> Path:
    """Where downloads and decoded images are kept."""
    return Path(pooch.os_cache("torch_penalty_bilevel"))


def default_folder(name: str, data_dir: Path | None = None) -> Path:
    """The folder of the data set ``name``.

    It is ``data_dir / name`` where a folder of data is given; else that of the shared data beside
    the checkout, where there is one; else one in the user's cache.
    """
    if data_dir is not None:
        return data_dir / name
    beside = BESIDE / name
    return beside if beside.is_dir() else user_cache() / name


def absent(folder: Path, names: Iterable[str], address: str, reason: object) -> SystemExit:
    """The error of data that are neither in ``folder`` nor to be had."""
    return SystemExit(
        f"the data are not complete in {folder}\n({reason})\n"
        f"Put these files there, or name the folder that has them: {', '.join(names)}\n"
        f"They are from {address}"
    )


def fetched(folder: Path, mirror: Mirror) -> dict[str, Path]:
    """Every file of ``mirror`` in ``folder``; those that it lacks are downloaded into it.

    A file that is there is never replaced.

    Raises:
        SystemExit: a file is neither there nor to be had, or is not the original; the message says
            what to put where.
    """
    return {name: _fetched(folder, mirror, name) for name in mirror.hashes}


def _fetched(folder: Path, mirror: Mirror, name: str) -> Path:
    path, known = folder / name, mirror.hashes[name]
    algorithm, _, value = known.partition(":")
    if not path.exists():
        try:
            pooch.retrieve(mirror.address + name, known, name, folder, progressbar=True)
        except (requests.RequestException, OSError, ValueError) as error:
            reason = f"{name} could not be downloaded: {error}"
            raise absent(folder, mirror.hashes, mirror.address, reason) from error
    elif (found := pooch.file_hash(str(path), algorithm)) != value:
        raise SystemExit(
            f"{path} is not the original file: its {algorithm} is {found}, not {value}\n"
            f"Move it away, then it is downloaded from {mirror.address}"
        )
    return path
