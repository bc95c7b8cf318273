"""Rules for the multiplier beside the default: is their hypergradient right along the run?

    python -m benchmarks.multipliers --data DIR  # the tables of benchmarks/README.md
    python -m benchmarks.multipliers --rules default anderson --problems smd22 --seeds 5

At looks spread evenly over a run (20; digits and mnist 5) the hypergradient estimate of that
step is compared with the exact one at the very (u, v) where it was made, which shows the
multiplier's error, and with the exact one at (u, v*(u)), the lower level solved, which shows that
of v as well (``reference.py``). The error is ||estimate - h|| / max(||estimate||, ||h||), between 0
and 2 also where h vanishes; 0 where both are below rounding. A run counts by the median over its
looks, a cell by the median over the seeds (their range).

Rule "exact" takes the exact multiplier in every evaluation that serves u: what is left is v's lag.

Deterministic (Adam 0.1 on both levels with cosine decay, a warm-up of at most a 20th):

    quadratic1, quadratic3   condition number of the lower level 1e1 and 1e3; 150 x 5 steps
    smd20, 22, 23, 24        also with the seed's own A; 150 x 5 steps
    least_squares            H has a null space, as in smd22 to smd24; 150 x 5 steps
    digits                   ``digits_l2.py`` from e^-7, split by the seed; 100 x 5 steps

With minibatches (one lower step each; the estimate is that of all data with the step's q):

    digits_batches   100 images for each loss, 200 steps, Adam 0.03 with cosine decay
    mnist            a weight per image, half of the labels drawn anew, a linear model; 150 steps
                     of batch 200; exact is with H + 1e-2; v*(u) is out of reach (float32)

End: the final error of ``torch_penalty_bilevel.testing``; digits: f(u, v*(u)); mnist: 1 - area
under the ROC curve of the learned weights. "inf": an error was raised or v has run off; "warned":
the optimizer warned, in so many seeds. Cost: gradients and products per lower step, first problem.
"below, above": on how many problems a rule is below and above the default by more than a tenth in
every seed.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.multipliers import problems, tables
from benchmarks.multipliers.names import RULES
from benchmarks.multipliers.runs import End, Job, run
from benchmarks.shared import mnist_rows as rows
from examples.shared import command
from examples.shared.record import Line, Record


def identity(job: Job) -> Line:
    """What a line of the record is of."""
    return {**job._asdict(), "data": None}


def ended(jobs: list[Job], processes: int | None, record: Record | None) -> dict[Job, End]:
    """How the jobs end; those of the record are not run again."""
    found = {job: identity(job) for job in jobs}
    ends = {
        job: End(**record[line])
        for job, line in found.items()
        if record is not None and line in record
    }
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(run, job): job for job in jobs if job not in ends}
        for future in tqdm(as_completed(running), total=len(running), unit="run"):
            job = running[future]
            ends[job] = future.result()
            if record is not None:
                record.add(found[job], ends[job]._asdict())
    return {job: ends[job] for job in jobs}


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES])
    parser.add_argument("--problems", nargs="+", choices=problems.NAMES, default=[*problems.NAMES])
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (3)")
    parser.add_argument("--data", type=Path, default=rows.default_folder("mnist"), help="of MNIST")
    parser.add_argument("--share", type=float, default=1.0, help="of the upper steps (1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument(
        "--record",
        type=Path,
        help="file of ended runs, which are not run again; delete it when the code has changed",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # as every run's process does
    jobs = [
        Job(rule, problem, seed, options.data, options.share)
        for seed in range(options.seeds)
        for problem in options.problems
        for rule in options.rules
    ]
    record = None if options.record is None else Record(options.record)
    ends = ended(jobs, options.jobs, record)
    for title in tables.TABLES:
        print("\n" + tables.table(title, options.rules, options.problems, ends))
    print(f"\n{options.seeds} seeds; {command.machine()} per run")


if __name__ == "__main__":
    main()
