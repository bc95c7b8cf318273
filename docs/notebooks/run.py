"""Make the notebooks from the pages that they repeat, run them, and keep their outputs.

    python docs/notebooks/run.py

A page is the only source: its text becomes Markdown cells, its Python blocks code cells; hidden
blocks, shown outputs and pictures are left out, as the notebook has its own.
"""

import os
import re
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
SOURCES = {
    "tutorial": HERE.parent / "tutorial.md",
    "certificate": HERE.parent / "concepts" / "certificate.md",
}
_LEFT_OUT = re.compile(r"^<!--.*?-->\n|^```output\n.*?^```\n|^!\[.*?\]\(.*?\)\n", re.M | re.S)
_CODE = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def made(name: str) -> nbformat.NotebookNode:
    """The notebook of that name, not run."""
    page = SOURCES[name]

    def moved(link: re.Match[str]) -> str:
        return f"]({os.path.relpath(page.parent / link[1], HERE)}"

    parts = _CODE.split(_LEFT_OUT.sub("", page.read_text()))
    cells = []
    for place, part in enumerate(parts):
        if place % 2:
            cells.append(new_code_cell(part.rstrip()))
        elif part.strip():
            cells.append(new_markdown_cell(_LINK.sub(moved, part.strip())))
    for number, cell in enumerate(cells):
        cell["id"] = f"{name}-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run it in an empty folder; an error in a cell is raised."""
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": folder}}
        )
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which change with every run
    notebook.metadata.pop("language_info", None)
    return notebook


def main() -> None:
    """The command."""
    for name in SOURCES:
        nbformat.write(run(made(name)), HERE / f"{name}.ipynb")
        print(f"docs/notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
