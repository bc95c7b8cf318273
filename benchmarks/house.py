"""How the package is built: rooms, floors, circles, and the way of one steady step through it.

    python -m benchmarks.house           # of this checkout
    python -m benchmarks.house --trace   # and the calls of the step, in order

A room is a file or a folder at the top of the package; its floor is one above the highest room that
it imports. The step is that of a tanh network with one hidden layer and one weight per sample,
with one lower step, after 31 steps; counted are calls of functions of the package (comprehensions
are none) and changes of file between a call and the one before.
"""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import torch_penalty_bilevel as tpb
from examples.shared import command

PACKAGE = Path(tpb.__file__).parent
_COMPREHENSIONS = {"<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>"}  # no calls of ours


def rooms() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        room = parts[0].removesuffix(".py")
        imports = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                imports |= {name.split(".")[0] for name in names} - {room}
    del found["__init__"]
    return found


def floors(imports: dict[str, set[str]]) -> tuple[dict[str, int], list[str]]:
    """The floor of each room from 1, and rooms on a circle."""
    found: dict[str, int] = {}
    circles: list[str] = []

    def climb(room: str, way: tuple[str, ...]) -> int:
        if room in way:
            circles.append(" -> ".join((*way[way.index(room) :], room)))
            return 0
        if room not in found:
            below = [climb(other, (*way, room)) for other in sorted(imports[room])]
            found[room] = 1 + max(below, default=0)
        return found[room]

    for room in sorted(imports):
        climb(room, ())
    return found, circles


def calls_of_a_step() -> list[tuple[str, str]]:
    """(file, function) of each call inside the package, in order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    x, y = torch.randn(2, 64, 64), torch.randint(0, 10, (2, 64))
    scores = torch.zeros(64, requires_grad=True)
    optimizer = tpb.PenaltyBilevelOptimizer([scores], net.parameters(), curvature="double_backward")

    def f() -> torch.Tensor:
        return cross_entropy(net(x[0]), y[0])

    def g() -> torch.Tensor:
        return (scores.sigmoid() * cross_entropy(net(x[1]), y[1], reduction="none")).mean()

    for _ in range(31):  # the 32nd takes no probe
        optimizer.step(f, g)
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        inside = code.co_filename.startswith(str(PACKAGE))
        if event == "call" and inside and code.co_name not in _COMPREHENSIONS:
            file = Path(code.co_filename).relative_to(PACKAGE)
            calls.append((str(file), getattr(code, "co_qualname", code.co_name)))

    sys.setprofile(note)
    try:
        optimizer.step(f, g)
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--trace", action="store_true", help="print the calls of the step")
    chosen = parser.parse_args()
    imports = rooms()
    found, circles = floors(imports)
    calls = calls_of_a_step()
    files = [file for file, _ in calls]
    changes = sum(a != b for a, b in itertools.pairwise(files))
    if chosen.trace:
        print("\n".join(f"{file:<34}{name}" for file, name in calls), "\n")
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    print("| rooms | floors | circles | lines | calls per step | changes of file | files |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {len(imports)} | {max(found.values())} | {len(circles)} | {lines} | {len(calls)} | "
        f"{changes} | {len(set(files))} |\n"
    )
    for floor in range(1, max(found.values()) + 1):
        print(f"floor {floor}: {', '.join(sorted(r for r in found if found[r] == floor))}")
    print("\n".join(circles))


if __name__ == "__main__":
    main()
