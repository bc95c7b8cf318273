"""Draw the pictures of the documentation, or those that are named.

    python -m docs.pictures [tutorial adjoint certificate pull warm_up]

Half a minute on one core; every seed is fixed.
"""

import argparse
import importlib
from pathlib import Path

import matplotlib
import torch

NAMES = ("tutorial", "adjoint", "certificate", "pull", "warm_up")
DOCS = Path(__file__).parents[1]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; default: all")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    matplotlib.use("agg")
    torch.set_num_threads(1)
    for name in names:
        folder = DOCS if name == "tutorial" else DOCS / "concepts"
        importlib.import_module(f"docs.pictures.{name}").draw(folder)


if __name__ == "__main__":
    main()
