"""The documentation builds without a warning, and every link in it leads somewhere."""

import inspect
import pathlib
import re

import site_pages

import torch_penalty_bilevel as tpb
from torch_penalty_bilevel import constraints, functional, integrations, nn, plotting, testing

ROOT = pathlib.Path(__file__).parents[2]


def test_every_link_within_the_site_leads_somewhere(folder):
    assert site_pages.broken(site_pages.read(folder), folder) == []


def test_links_outside_are_those_of_the_list(folder):
    outside = site_pages.outside(site_pages.read(folder))
    listed = (ROOT / "docs" / "external-links.txt").read_text().split()
    assert sorted(outside["followed"]) == listed
    assert outside["loaded"] == set(), "a page loads what a reader without a network has not"


BY_NAME = {"BilevelCallback", "MicroBatches", "BilevelTrainer"}  # of libraries that may be missing


def public_names():
    """Classes and functions of ``__all__``, or that the module or its room defines."""
    for module in (tpb, constraints, functional, integrations, nn, plotting, testing):
        for name, thing in vars(module).items():
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            listed = getattr(module, "__all__", None)
            here = thing.__module__.startswith(module.__name__) and not name.startswith("_")
            if here if listed is None else name in listed:
                yield name


def test_every_public_name_is_in_the_reference(folder):
    anchors = set()
    for page, reader in site_pages.read(folder).items():
        if page.parent.name == "reference":
            anchors |= {anchor.split(".")[-1] for anchor in reader.anchors if "." in anchor}
    inside = {"Faces", "LowerPoint", "everywhere"}  # which the package's own rooms share
    assert ({*public_names()} | BY_NAME) - inside - anchors == set()


def test_no_docstring_shows_markup_that_failed(folder):
    for page in (folder / "reference").glob("*.html"):
        text = page.read_text()
        assert "system-message" not in text, page.name
        assert not re.search(r"(?<!`)``\w", re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)), page


def test_broken_and_outside_links_are_seen(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        "<h1 id=here></h1><a href=sub/b.html></a><a href=sub/b.html#no></a><a href='#here'></a>"
        "<a href=none.html></a><img src=none.png?v=1><a href=../out.html></a>"
        "<a href=https://example.org/x#y></a><script src=https://example.org/s.js></script>"
    )
    (tmp_path / "sub" / "b.html").write_text("<a href=../a.html#here>")
    (tmp_path.parent / "out.html").touch()
    found = site_pages.read(tmp_path)
    assert sorted(site_pages.broken(found, tmp_path)) == [
        "a.html: ../out.html",
        "a.html: none.html",
        "a.html: none.png?v=1",
        "a.html: sub/b.html#no",
    ]
    assert site_pages.outside(found) == {
        "followed": {"https://example.org/x"},
        "loaded": {"https://example.org/s.js"},
    }


def test_commands_of_the_gallery_are_those_of_the_tables():
    results = (ROOT / "examples" / "RESULTS.md").read_text()
    for part in (ROOT / "docs" / "gallery.md").read_text().split("\n## ")[1:]:
        command = re.search(r"^```bash\n(.*)\n```", part, re.MULTILINE)
        if command and (table := re.search(r"\[Table\]\(results.md#(.*?)\)", part)):
            assert f"## {table[1]}\n\n`{command[1]}`\n" in results, part.splitlines()[0]
