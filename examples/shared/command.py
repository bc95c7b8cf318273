"""One way to read a command line: the flags that every example has, and what a run was on."""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch


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


def add_common(
    to: argparse.ArgumentParser,
    methods: Sequence[str],
    chosen: Sequence[str],
    budget: int,
    unit: str,
    seeds: int,
) -> None:
    """The flags that all examples share.

    Args:
        to: the parser.
        methods: what ``--method`` may name; several at once, or "all".
        chosen: those taken by default.
        budget: of one method on one seed, by default.
        unit: what the budget counts.
        seeds: number of seeds, by default.
    """
    name = to.prog.rpartition(".")[2]
    add = to.add_argument_group("flags of every example").add_argument
    add(
        "--method",
        nargs="+",
        choices=("all", *methods),
        default=list(chosen),
        metavar="METHOD",
        help=f'any of {", ".join(methods)}; or "all"; default: {" ".join(chosen)}',
    )
    add("--seeds", type=count, default=seeds, help=f"number of seeds ({seeds})")
    add("--first-seed", type=_seed, default=0, help="the first of them (0)")
    until = f"{unit} per method, seed, until its last step ends ({budget})"
    add("--budget", type=count, default=budget, help=until)
    add("--device", default="auto", help='"cpu", "cuda", ...; "auto": cuda where there is one')
    add("--threads", type=_threads, default=1, help="torch threads (1)")
    where = "holds a folder per data set (beside the checkout, or cache)"
    add("--data-dir", type=folder, help=where)
    add("--out", type=Path, default=Path("results") / name, help=f"folder (results/{name})")
    add("--resume", action="store_true", help="go on with what --out holds, unfinished runs too")
    add("--smoke", action="store_true", help="does it run? one seed, tiny sizes, seconds")


def methods_of(options: argparse.Namespace, methods: Sequence[str]) -> list[str]:
    """What ``--method`` asks for, in the order of ``methods``."""
    asked = set(options.method)
    return [name for name in methods if name in asked or "all" in asked]


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds that are asked for."""
    count = 1 if options.smoke else options.seeds
    return range(options.first_seed, options.first_seed + count)


def device_of(options: argparse.Namespace) -> torch.device:
    """The device that is asked for.

    Raises:
        SystemExit: torch does not know it or cannot use it here.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise SystemExit(f"--device {name} cannot be used here: {first}") from error


def machine(device: torch.device | str = "cpu") -> str:
    """One line: versions, processor or GPU, threads."""
    device = torch.device(device)
    where = platform.machine()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {where}, "
        f"{threads} thread{'s' * (threads != 1)}"
    )


def count(text: str) -> int:
    """A count on a command line."""
    if not text.isdecimal() or not 1 <= int(text) < 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def folder(text: str) -> Path:
    """A folder on a command line that is there: of a mistyped one nothing is made."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{path} is no folder; make it first if data are to be downloaded into it"
        )
    return path


def rate(text: str) -> float:
    """A learning rate on a command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text}")
    return int(text)


def _threads(text: str) -> int:
    most = os.cpu_count() or 1
    if count(text) > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, the processors here, got {text}")
    return int(text)
