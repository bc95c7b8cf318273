"""Every code block of the documentation runs as it stands, and prints what the page says."""

import contextlib
import pathlib

import matplotlib
import pages
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# docs/README.md is about the pages, the changelog is included text.
PAGES = sorted(
    page
    for page in DOCS.rglob("*.md")
    if "_build" not in page.parts and page != DOCS / "README.md" and pages.blocks(page)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)  # as a reader would have it
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    pages.run_page(page)


def write(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_names_and_lines_are_those_of_the_page(tmp_path):
    page = write(
        tmp_path,
        "# A page\n\n<!-- run\nx = 1\n-->\n\n```python\nprint(x + 1)\n```\n```output\n2\n```\n"
        "```pycon\n>>> x + 2\n3\n>>> y = 7\n```\n```bash\nrm x\n```\n"
        "```python\nz = y\n1 / 0\n```\n",
    )
    assert [b.kind for b in pages.blocks(page)] == ["python", "python", "output", "pycon", "python"]
    with pytest.raises(ZeroDivisionError) as error:
        pages.run_page(page)
    assert error.traceback[-1].lineno + 1 == 23
    assert page.read_text().splitlines()[22] == "1 / 0"


@pytest.mark.parametrize(
    "text", ["```python\nprint(1)\n```\n```output\n2\n```\n", "```pycon\n>>> 1\n2\n```\n"]
)
def test_a_wrong_output_is_seen(tmp_path, text):
    with pytest.raises(AssertionError, match="2"):
        pages.run_page(write(tmp_path, text))


SHOWS_ONE = "<!-- within 0.05 -->\n```output\n1.0 mm\n```\n"


@pytest.mark.parametrize(
    ("printed", "passes"), [("1.04 mm", 1), ("1.06 mm", 0), ("1.04 m", 0), ("1.04 mm 1", 0)]
)
def test_numbers_within_a_share(tmp_path, printed, passes):
    page = write(tmp_path, f"```python\nprint('{printed}')\n```\n{SHOWS_ONE}")
    with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match="mm"):
        pages.run_page(page)


def test_a_page_that_needs_what_is_missing_is_skipped_with_the_reason(tmp_path):
    page = write(tmp_path, "<!-- needs: no_such_library -->\n```python\n1 / 0\n```\n")
    with pytest.raises(pytest.skip.Exception, match="no_such_library"):
        pages.run_page(page)
