"""The published synthetic problems with known solutions, by the published methods.

    python -m examples.synthetic                       # table and picture, three starts
    python -m examples.synthetic --seeds 20            # as many starts as were published
    python -m examples.synthetic --problems smd23 smd24 --method penalty penalty_no_pull

After Mehra & Hamm (ACML 2021): the problem of their figure 1 and SMD20 to SMD24 of their code
(``formulation.py`` has the formulas). Every seed draws its own A and its own start in the box
[-5, 5], the same for all methods; the box is not enforced, as it is in their code, for some of the
v*(u) lie outside.

    penalty          this package's default
    penalty_no_pull  the same without its pull towards small upper losses (share=0)
    paper            the published schedule of multiplier and penalty, with its own constants
    approx_grad      ApproxGrad: gradient steps on |H q + grad f|^2
    reverse          RMD: back through the lower steps, which are plain gradient steps
    alternating      the paper's "GD": descent on f in u with v held, and on g in v

All take Adam steps at one rate for both levels, which falls to 0 along a cosine of the budget
spent; v in "reverse" takes gradient steps of 1 / curvature. A budget counts gradients and
second-order products. Rates and lower steps were chosen on seed 100 (``methods.py``).

What to see there. On the solutions of the lower level of figure1 and SMD21 to SMD23 f has no slope
in u (its first term is free of u, the other one is stationary): "alternating" stops as soon as v
has come to u, wherever that is. On SMD20 and SMD24 it goes to u = 0, its own fixed point.
The lower level of SMD23 does not see the part of v in the null space of A; f wants that part to
be 0, and only the pull makes it so: "penalty" goes on where "penalty_no_pull" and all that solve
with H stand still. The published error of SMD22 and SMD24 leaves that part out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from examples.shared import command
from examples.shared.experiment import Experiment, by_seed
from examples.shared.record import Line
from examples.synthetic.formulation import FORMULAS
from examples.synthetic.methods import METHODS, perform
from examples.synthetic.report import by_problem, draw, section

BUDGET, SMOKE_BUDGET = 5000, 400


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=tuple(FORMULAS), default=list(FORMULAS), help="(all)")
    add("--rate", type=command.rate, help="of both levels (tuned)")
    add("--lower-steps", type=command.count, help="per upper step (tuned)")
    command.add_common(
        parser, tuple(METHODS), tuple(METHODS), BUDGET, "gradients and products", seeds=3
    )
    options = parser.parse_args()
    if options.smoke:
        options.budget = SMOKE_BUDGET
    if options.device not in ("auto", "cpu"):
        parser.error(f"--device {options.device}: these problems are too small for any but cpu")
    options.device = "cpu"
    return options


def planned(options: argparse.Namespace) -> list[Line]:
    """Every run that is asked for, as the record knows it; seed by seed."""
    return [
        {
            "problem": problem,
            "method": method,
            "seed": seed,
            "rate": METHODS[method].rate if options.rate is None else options.rate,
            "steps": options.lower_steps or METHODS[method].steps,
            "budget": options.budget,
        }
        for seed in command.seeds_of(options)
        for problem in FORMULAS
        if problem in options.problems
        for method in command.methods_of(options, tuple(METHODS))
    ]


def main() -> None:
    """Run what is asked for; print and draw it."""
    options = parse()
    torch.set_num_threads(options.threads)
    experiment, plan = Experiment("synthetic", options), planned(options)

    def picture(content: Line, path: Path) -> None:
        draw(by_problem(content["runs"]), options.budget, path)

    experiment.report(by_seed(plan), perform, picture, section)


if __name__ == "__main__":
    main()
