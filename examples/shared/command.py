"""One way to read a command line."""

from __future__ import annotations

import argparse
from importlib.machinery import ModuleSpec


def parser(module: ModuleSpec | None, text: str | None) -> argparse.ArgumentParser:
    """A parser whose usage says how to call ``module``, and that keeps the lines of ``text``.

    Args:
        module: ``__spec__`` of the program.
        text: its docstring.
    """
    name = module.name.removesuffix(".__main__") if module else ""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
