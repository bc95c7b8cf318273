"""The documentation as it is built: its pages, their links and anchors."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

DOCS = pathlib.Path(__file__).parents[2] / "docs"
_ADDRESS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}


def build(folder: pathlib.Path) -> None:
    """Build the site into ``folder``; a warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        capture_output=True,
        text=True,
        cwd=DOCS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag in _ADDRESS and (address := found.get(_ADDRESS[tag])):
            self.addresses.add((tag, address))


def read(folder: pathlib.Path) -> dict[pathlib.Path, _Reader]:
    """What every page of the site holds."""
    pages = {}
    for page in sorted(folder.rglob("*.html")):
        if "_static" in page.parts:  # the theme's own templates
            continue
        reader = _Reader()
        reader.feed(page.read_text())
        pages[page.resolve()] = reader
    return pages


def broken(pages: dict[pathlib.Path, _Reader], folder: pathlib.Path) -> list[str]:
    """Links to pages, files or anchors of the site that are not there."""
    found = []
    for page, reader in pages.items():
        for _, address in reader.addresses:
            scheme, host, path, _, anchor = urlsplit(address)
            if scheme or host:
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            if target.is_dir():
                target /= "index.html"
            missing = not target.is_file() or not target.is_relative_to(folder.resolve())
            if missing or (anchor and target in pages and anchor not in pages[target].anchors):
                found.append(f"{page.name}: {address}")
    return found


def outside(pages: dict[pathlib.Path, _Reader]) -> dict[str, set[str]]:
    """Addresses outside of the site: those a reader may follow, and those a page itself loads."""
    result: dict[str, set[str]] = {"followed": set(), "loaded": set()}
    for reader in pages.values():
        for tag, address in reader.addresses:
            if urlsplit(address).scheme in ("http", "https") or address.startswith("//"):
                result["followed" if tag == "a" else "loaded"].add(urldefrag(address)[0])
    return result
