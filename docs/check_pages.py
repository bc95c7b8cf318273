"""Look at every page of the built site in a real browser, as wide as a desk's screen and a phone's.

    python docs/check_pages.py [--site docs/_build/html] [--pictures FOLDER] [--pages PAGE ...]

Serves the site on 127.0.0.1, opens each page in headless Chromium at 1280 and 390 px, and reports
what the console complained about, requests that failed or left the machine, pages wider than the
screen, pictures that did not load, and formulas without width. Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SITE = pathlib.Path(__file__).parent / "_build" / "html"
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_BAD = ("error", "warning")

# Of the page as it is laid out: its width, and what did not come.
_LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll('article *')].filter(e => {
        if (e.getBoundingClientRect().right <= window.innerWidth + 1) return false;
        for (let p = e.parentElement; p.tagName != 'ARTICLE'; p = p.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
        return true;
    }).map(e => e.tagName + '.' + e.className).slice(0, 3),
    blank: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    flat: [...document.querySelectorAll('math')].filter(
        m => m.checkVisibility() && !m.getBoundingClientRect().width).length,
})"""

# Pictures load when they come into sight; here all of them now.
_PICTURES = """() => Promise.all([...document.images].map(i => {
    i.loading = 'eager';
    return i.complete || new Promise(done => { i.onload = i.onerror = done; });
}))"""


def browser() -> str | None:
    """The path of a Chromium on this machine; the variable CHROMIUM overrides."""
    found = (shutil.which(name) for name in _BROWSERS)
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: pathlib.Path) -> Iterator[str]:
    """The address at which the folder is served while the block runs."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Look:
    """One screen of the browser, and what was wrong with the pages that it showed."""

    def __init__(self, chromium: Any, address: str, screen: str) -> None:
        self.address, self.screen, self.found = address, screen, list[str]()
        self.width, height = SCREENS[screen]
        self.where = ""
        size = {"width": self.width, "height": height}
        self.tab = chromium.new_context(viewport=size).new_page()
        self.tab.on("console", lambda m: m.type in _BAD and self.say(f"console: {m.text}"))
        self.tab.on("pageerror", lambda error: self.say(f"script: {error}"))
        self.tab.on("requestfailed", lambda r: self.say(f"no answer from {r.url}"))
        self.tab.on("response", lambda r: r.status >= 400 and self.say(f"{r.status} from {r.url}"))
        self.tab.on("request", lambda r: self._asked(r.url))

    def say(self, what: str) -> None:
        """Note a complaint about the page in view."""
        self.found.append(f"{self.where} ({self.screen}): {what}")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.say(f"asks {url}, which is not the site")

    def open(self, page: str, picture: pathlib.Path | None) -> None:
        """Show a page, measure it, and take its picture."""
        self.where = page
        self.tab.goto(self.address + page, wait_until="load")
        self.tab.evaluate(_PICTURES)
        seen = self.tab.evaluate(_LOOK)
        if seen["width"] > self.width or seen["wide"]:
            self.say(f"{seen['width']} px wide, the screen {self.width}: {seen['wide']}")
        for source in seen["blank"]:
            self.say(f"the picture {source} did not load")
        if seen["flat"]:
            self.say(f"{seen['flat']} formulas have no width")
        if picture:
            self.tab.screenshot(path=str(picture), full_page=True)


def complaints(
    site: pathlib.Path, pages: list[str], pictures: pathlib.Path | None = None
) -> list[str]:
    """What is wrong with the pages, one line each; screenshots go into ``pictures``."""
    from playwright.sync_api import sync_playwright

    found: list[str] = []
    with served(site) as address, sync_playwright() as play:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = play.chromium.launch(executable_path=browser(), args=options)
        for screen in SCREENS:
            look = Look(chromium, address, screen)
            for page in pages:
                name = page.removesuffix(".html").replace("/", "-")
                look.open(page, pictures and pictures / f"{name}-{screen}.png")
            found += look.found
        chromium.close()
    return found


def all_pages(site: pathlib.Path) -> list[str]:
    """Paths of the site's pages, relative to it."""
    return sorted(
        str(page.relative_to(site)) for page in site.rglob("*.html") if "_static" not in page.parts
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=pathlib.Path, default=SITE, help="the built site")
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for screenshots")
    parser.add_argument("--pages", nargs="*", help="only these, such as concepts/pull.html")
    args = parser.parse_args()
    if browser() is None:
        print(f"no browser: none of {', '.join(_BROWSERS)} is installed, CHROMIUM is not set")
        return 1
    pages = args.pages or all_pages(args.site)
    found = complaints(args.site, pages, args.pictures)
    print(
        "\n".join(found) or f"{len(pages)} pages at {len(SCREENS)} widths: nothing to complain of"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
