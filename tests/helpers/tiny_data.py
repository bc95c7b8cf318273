"""Small files in the formats of real data sets."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch
from PIL import Image

from examples.data import mirrors
from examples.data.mirrors import Mirror


def cache_in(monkeypatch, folder):
    """The user's cache lies in ``folder``."""
    monkeypatch.setattr(mirrors.pooch, "os_cache", lambda name: folder / "cache" / name)


def pixels(random, *shape):
    return random.integers(256, size=shape, dtype=np.uint8)


def same(found, expected):
    """Also of the same type."""
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=0, atol=0)


def as_original(monkeypatch, module, folder, field="MIRROR"):
    """The files that lie in ``folder`` are what ``module`` takes for the originals."""
    names = getattr(module, field).hashes
    hashes = {
        name: "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names
    }
    monkeypatch.setattr(module, field, Mirror("http://localhost:9/", hashes))


def picture(pixels, kind="PNG"):
    """Bool (H, W) in black and white, or uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def write_tar(path, members):
    """Compressed as the name says."""
    with tarfile.open(path, f"w:{path.name.rsplit('.', 1)[1]}") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def write_idx(path, values):
    """As MNIST's: 0, 0, 8 for uint8, the number of axes, their lengths, then the bytes."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


class _Python2(pickle._Pickler):
    """Texts and bytes are one type there, and have opcodes of their own."""

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def python2_pickle(value):
    """As Python 2 with numpy 1 wrote it, which is how CIFAR-10's are."""
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
