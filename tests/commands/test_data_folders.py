"""Where the examples' data come from: folders, downloads by hash, and the cache of the decoded."""

import contextlib
import functools
import hashlib
import http.server
import re
import threading

import numpy as np
import pytest

for library in ("PIL", "pooch", "requests", "tqdm"):
    pytest.importorskip(library)

from tiny_data import cache_in  # noqa: E402

from examples.data import cache, mirrors  # noqa: E402

CONTENTS = {"a.bin": b"first file", "b.bin": bytes(range(256)) * 40}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of ``folder`` on this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def user_cache(monkeypatch, tmp_path):
    cache_in(monkeypatch, tmp_path)
    return tmp_path / "cache" / "torch_penalty_bilevel"


def mirror_at(address):
    return mirrors.Mirror(
        address,
        {name: "sha256:" + hashlib.sha256(value).hexdigest() for name, value in CONTENTS.items()},
    )


def test_a_given_folder_goes_before_the_shared_and_that_before_the_cache(
    monkeypatch, tmp_path, user_cache
):
    monkeypatch.setattr(mirrors, "BESIDE", tmp_path / "beside")
    (tmp_path / "beside" / "mnist").mkdir(parents=True)
    assert mirrors.default_folder("mnist", tmp_path / "own") == tmp_path / "own" / "mnist"
    assert mirrors.default_folder("mnist") == tmp_path / "beside" / "mnist"
    assert mirrors.default_folder("svhn") == user_cache / "svhn"


def test_files_are_downloaded_once(source, tmp_path):
    folder = tmp_path / "new" / "folder"
    with served(source) as address:
        found = mirrors.fetched(folder, mirror_at(address))
    assert {name: path.read_bytes() for name, path in found.items()} == CONTENTS
    assert mirrors.fetched(folder, mirror_at(address)) == found  # with nothing there to serve them


def test_the_error_says_what_to_put_where(source, tmp_path):
    with served(source) as address:
        pass  # nothing answers there any more
    folder = tmp_path / "folder"
    with pytest.raises(SystemExit) as caught:
        mirrors.fetched(folder, mirror_at(address))
    said = str(caught.value)
    assert all(part in said for part in ("a.bin, b.bin", address, str(folder), "refused"))


def test_a_download_with_another_hash_is_refused(source, tmp_path):
    (source / "b.bin").write_bytes(b"something else")
    folder = tmp_path / "folder"
    with (
        served(source) as address,
        pytest.raises(SystemExit, match=r"b\.bin could not be downloaded: .*hash"),
    ):
        mirrors.fetched(folder, mirror_at(address))
    assert [path.name for path in folder.iterdir()] == ["a.bin"]


def test_a_file_of_the_users_is_never_replaced(source):
    mine = source / "b.bin"
    mine.write_bytes(b"mine")
    with (
        served(source) as address,
        pytest.raises(SystemExit, match=re.escape(f"{mine} is not the original file")),
    ):
        mirrors.fetched(source, mirror_at(address))
    assert mine.read_bytes() == b"mine"


class Counted:
    """Makes arrays and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([2.5])}


def times_made(archive, make, content="all"):
    arrays = cache.cached(archive, content, make)
    assert sorted(arrays) == ["a", "b"]
    assert arrays["a"].dtype == np.uint8
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].tolist() == [2.5]
    return make.times


def test_an_archive_is_decoded_once_per_content(source):
    make, archive = Counted(), source / "a.bin"
    assert [times_made(archive, make), times_made(archive, make)] == [1, 1]
    assert times_made(archive, make, "another") == 2
    archive.write_bytes(b"other file")  # as long as it was, with the same name
    assert times_made(archive, make) == 3


def test_a_broken_cache_is_made_again(source, user_cache):
    make, archive = Counted(), source / "a.bin"
    times_made(archive, make)
    (kept,) = (user_cache / "decoded").iterdir()
    whole = kept.read_bytes()
    for times, broken in enumerate((whole[:100], b"", b"no zip at all" * 50), start=2):
        kept.write_bytes(broken)
        assert times_made(archive, make) == times
        assert kept.read_bytes() == whole


def test_without_a_cache_it_is_said_and_goes_on(source, user_cache, capsys):
    user_cache.parent.mkdir()
    user_cache.write_text("a file where the folder should be")
    make = Counted()
    assert times_made(source / "a.bin", make) == 1
    assert "a.bin will be decoded again" in capsys.readouterr().err
    assert times_made(source / "a.bin", make) == 2


def test_writing_that_is_cut_off_leaves_nothing(source, user_cache, monkeypatch):
    def cut(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.np, "savez", cut)
    with pytest.raises(KeyboardInterrupt):
        cache.cached(source / "a.bin", "all", Counted())
    assert list((user_cache / "decoded").iterdir()) == []
