"""A run comes back after f or g was silent, a scale was another one, or a rate was zero.

Where a scale changes by s the rate of its level changes by 1 / s: the problem is the same, and
only what the optimizer remembers is wrong, by six orders.
"""

import itertools

import pytest
from known import PROBLEMS, RATES, bias
from phases import Phase, Run
from size import LONG, sized

PHASES = {
    "f off": Phase(150, f=0.0),
    "g flat": Phase(100, g=0.0),
    "rates off": Phase(50, rate=0.0),
    "upper off": Phase(100, upper=0.0),
    "lower off": Phase(100, lower=0.0),
    "f up": Phase(100, f=1e6, upper=1e-6),
    "f down": Phase(100, f=1e-6, upper=1e6),
    "g up": Phase(100, g=1e6, lower=1e-6),
    "g down": Phase(100, g=1e-6, lower=1e6),
}
OF_G = ("g flat", "g up", "g down")  # a map has no scale and is never flat

# The bound on the curvature is forgotten by a thousandth, or a hundredth, per step.
LATE = {"g up": 2500, "g down": 2500}


def cases():
    """(penalty, problem, phases)"""
    for penalty, problem in itertools.product(("stationarity", "value", "fixed_point"), ("followed", "sloped", "indefinite", "loose")):
        for phase in PHASES:
            if penalty != "fixed_point" or phase not in OF_G:
                yield penalty, problem, (phase,)


def marked(penalty, problem, phases):
    return pytest.param(penalty, problem, phases, id="-".join((penalty, problem, *phases)))


@pytest.mark.filterwarnings("ignore:.*not to be trusted", "ignore:.*restarts from zero")
@pytest.mark.parametrize(("penalty", "problem", "phases"), [marked(*case) for case in cases()])
def test_a_run_comes_back(penalty, problem, phases):
    run = Run(PROBLEMS[problem](), rates=RATES[problem], penalty=penalty)
    tail = max(LATE.get(name, 600) for name in phases)
    run.go([Phase(60), *(PHASES[name] for name in phases), Phase(tail)])

    assert run.errors[-1] <= 1e-6 + 3 * bias(problem, run)
