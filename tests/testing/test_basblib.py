"""Known optima of constrained problems: solved, and the table of them checked by brute force.

Definitions and optima: BASBLib (Paulavicius & Adjiman), QP-QP problems, after the papers named
there. An entry holds F, g, upper h ("above"), lower h ("below"), boxes, start, learning rates and
the optimum (x, y, F*).
"""

import pytest
import torch
from constrained import PLAIN, SGD, leaf

from torch_penalty_bilevel import PenaltyBilevelOptimizer
from torch_penalty_bilevel.constraints import Box, Inequality


def stack(*rows):
    return torch.cat(rows)


BASBLIB = {
    "cw_1990_02": {  # Clark & Westerberg 1990; (3, 5) with F = 9 is a local solution
        "f": lambda x, y: (x - 3) ** 2 + (y - 2) ** 2,
        "g": lambda x, y: (y - 5) ** 2,
        "below": lambda x, y: stack(-2 * x + y - 1, x - 2 * y + 2, x + 2 * y - 14),
        "boxes": ((0, 8), (0, 8)),
        "start": (0.5, 2.0),
        "rates": (0.01, 0.1),
        "best": (1.0, 3.0, 5.0),
    },
    "d_1992_01": {  # Dempe 1992; F has zero slope and curvature at the optimum
        "f": lambda x, y: (x - 3.5) ** 2 + (y + 4) ** 2,
        "g": lambda x, y: (y - 3) ** 2,
        "below": lambda x, y: y**2 - x,
        "boxes": ((1, 10), (1, 10)),
        "start": (1.2, 1.0),
        "rates": (0.5, 0.05),
        "best": (1.0, 1.0, 31.25),
        "rate": 0.5,
        "point_tolerance": 0.1,  # F - F* = (x - 1)^3 / 2
        "tolerance": 1e-4,
    },
    "sc_1998_01": {  # Shimizu, Ishizuka & Bard 1997 after Gumus & Floudas 2001
        "f": lambda x, y: (x - 3) ** 2 + (y - 2) ** 2,
        "g": lambda x, y: (y - 5) ** 2 + 0 * x * y,  # v does not respond, and it is meant
        "above": lambda x, y: stack(-2 * x + y - 1, x - 2 * y + 2, x + 2 * y - 14),
        "boxes": ((0, 8), (0, 10)),
        "start": (0.5, 2.0),
        "rates": (0.03, 0.2),
        "best": (3.0, 5.0, 9.0),
    },
    "tmh_2007_01": {  # Tuy, Migdalas & Hoai-Phuong 2007; a linear lower level
        "f": lambda x, y: x**2 + y**2,
        "g": lambda x, y: -y + 0 * x,
        "below": lambda x, y: stack(3 * x + y - 15, x + y - 7, x + 3 * y - 15),
        "boxes": ((0, 10), (0, 10)),
        "start": (3.0, 4.0),
        "rates": (0.02, 0.1),
        "best": (1.5, 4.5, 22.5),
    },
    "b_1998_04": {  # Bard 1998; dy/dx = 50
        "f": lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        "g": lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        "boxes": ((-100, 100), (-100, 100)),
        "start": (10.05, 5.0),
        "rates": (1e-4, 0.5),
        "best": (10.016393442622950, 0.8196721311475, 81.3278688524590),
        "tolerance": 1e-3,
    },
    "b_1998_05": {  # the same with y >= 0
        "f": lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        "g": lambda x, y: 0.5 * y**2 + 500 * y - 50 * x * y,
        "boxes": ((-100, 100), (0, 100)),
        "start": (5.0, 5.0),
        "rates": (0.05, 0.5),
        "best": (1.0, 0.0, 1.0),
    },
    "sa_1981_01": {  # Shimizu & Aiyoshi 1981; feasible only for x >= 10, a kink at the optimum
        "f": lambda x, y: x**2 + (y - 10) ** 2,
        "g": lambda x, y: (x + 2 * y - 30) ** 2,
        "above": lambda x, y: y - x,
        "below": lambda x, y: x + y - 20,
        "boxes": ((0, 15), (0, 20)),
        "start": (12.0, 7.0),
        "rates": (0.01, 0.05),
        "best": (10.0, 10.0, 100.0),
        "tolerance": 2e-2,
    },
}


@pytest.mark.parametrize("name", BASBLIB)
@pytest.mark.long
def test_known_optima_of_basblib(name):
    problem = BASBLIB[name]
    u, v = leaf([problem["start"][0]]), leaf([problem["start"][1]])
    sets = [[Box(float(low), float(high))] for low, high in problem["boxes"]]
    rate = problem.get("rate", 0.1)
    for level, key in enumerate(("above", "below")):
        if key in problem:
            sets[level].append(Inequality(lambda key=key: problem[key](u, v), rate=rate))
    optimizer = PenaltyBilevelOptimizer(
        SGD([u], problem["rates"][0]),
        SGD([v], problem["rates"][1]),
        penalty=PLAIN,
        warmup_steps=60,
        upper_constraint=sets[0],
        lower_constraint=sets[1],
    )
    for _ in range(450):
        loss = optimizer.step(lambda: problem["f"](u, v).sum(), lambda: problem["g"](u, v).sum())
    x, y, best = problem["best"]
    tolerance = problem.get("tolerance", 2e-4)
    near = problem.get("point_tolerance", tolerance)
    assert abs(u.item() - x) < near * max(1, abs(x))
    assert abs(v.item() - y) < near * max(1, abs(y))
    assert abs(loss.item() - best) < tolerance * max(1, abs(best))


@pytest.mark.parametrize("name", BASBLIB)
def test_the_table_of_optima_is_right(name):
    """Brute force: the lower problem on a grid of y for a grid of x, then the best feasible pair.

    The grid is a window around the table's point: 4 on both sides in x, 8 in y.
    """
    problem = BASBLIB[name]
    (xl, xh), (yl, yh) = problem["boxes"]
    px, py, best = problem["best"]
    x = torch.linspace(max(xl, px - 4), min(xh, px + 4), 1601)[:, None]
    y = torch.linspace(max(yl, py - 8), min(yh, py + 8), 3201)[None, :]
    x, y = torch.broadcast_tensors(x, y)

    def allowed(key):
        if key not in problem:
            return torch.ones_like(x, dtype=torch.bool)
        values = problem[key](x[None], y[None])
        return (values <= 1e-9).all(0)

    g = torch.where(allowed("below"), problem["g"](x, y), torch.inf)
    reply = g.argmin(1)
    rows = torch.arange(len(reply))
    feasible = g[rows, reply].isfinite() & allowed("above")[rows, reply]
    edge = (reply == 0) & (y[0, 0] > yl) | (reply == y.shape[1] - 1) & (y[0, -1] < yh)
    values = torch.where(feasible & ~edge, problem["f"](x, y)[rows, reply], torch.inf)
    found = int(values.argmin())
    spacing = float(x[1, 0] - x[0, 0])
    assert abs(float(x[found, 0]) - px) < 0.1 + 2 * spacing
    assert abs(float(values[found]) - best) < 0.02 * max(1, best)
