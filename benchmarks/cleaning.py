"""How robust learned weights are to the learning rates: nine settings of ``examples.denoise``.

    python -m benchmarks.cleaning --seeds 3                # scikit-learn's digits
    python -m benchmarks.cleaning --problems linear mlp    # MNIST; minutes per seed

Data, losses, budget and the two rates of the penalty method are those of the example; the rates
are multiplied by every pair of 1/3, 1 and 3.

Columns: test accuracy of the running network and of a fresh one trained with the learned weights,
the share of labels told right, the area under the ROC curve; "below filter": in how many seeds an
accuracy is below that of the agreement filter. Medians (ranges) over the seeds. Every finished run
is a line of the output file and is skipped when found there.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from examples.denoise.formulation import Cleaning
from examples.denoise.learned import learn, score
from examples.denoise.problem import load, make_problem
from examples.denoise.rows import ROWS, accuracy, fit
from examples.denoise.settings import SETTINGS
from examples.shared import command
from examples.shared.record import Line, Record
from examples.shared.run import Run
from examples.shared.table import markdown, spread

OUTPUT = Path("results/cleaning.jsonl")  # delete it when the code has changed
PROBLEMS = {
    "digits": ("digits", "tanh"),
    "linear": ("mnist", "linear"),
    "mlp": ("mnist", "mlp"),
}
FACTORS = (1 / 3, 1.0, 3.0)
FILTER = "agreement"
COLUMNS = {
    "running": "running",
    "retrained": "retrained",
    "told_right": "labels told right",
    "auc": "AUC",
}


def work(line: Line, folder: Path | None) -> Line:
    """A setting of the rates, or a row that learns no weights, on one seed."""
    dataset, model = PROBLEMS[line["problem"]]
    setting, seed = SETTINGS[dataset], line["seed"]
    sizes = {"train": setting.train, "clean": setting.clean, "noise": 0.5, "flip": "uniform"}
    problem = make_problem(load(dataset, folder), seed, model=model, **sizes)
    torch.manual_seed(seed)
    if "row" in line:
        name, scores, result = line["row"], ROWS[line["row"]](problem, setting.training), {}
    else:
        name, chosen = "penalty", setting.methods["penalty"]
        rates = chosen.rates._replace(
            lower=line["lower"] * chosen.rates.lower, upper=line["upper"] * chosen.rates.upper
        )
        task = Cleaning(problem, setting.clean_share, setting.decay, setting.batch)
        with tempfile.TemporaryDirectory() as place:
            run = Run({"method": name, **line}, Path(place), torch.device("cpu"))
            chosen = chosen._replace(rates=rates)
            scores, result = learn(name, task, chosen, setting.budget, run)
    fresh = fit(problem, scores, name, setting.training)
    retrained = accuracy(fresh, problem.test_images, problem.test_labels)
    return {**result, "retrained": retrained, **score(scores, problem)}


def named(line: Line) -> str:
    """The row of a run."""
    return line.get("row") or f"lower x {line['lower']:.2g}, upper x {line['upper']:.2g}"


def table(record: Record, runs: list[Line]) -> str:
    """Of one problem: every row over the seeds, and which end below the filter."""
    groups: dict[str, list[Line]] = {}
    for line in runs:
        groups.setdefault(named(line), []).append(record[line])
    bar = [result["retrained"] for result in groups[FILTER]]
    rows = {}
    for name, results in groups.items():
        values = ([r[key] for r in results if key in r] for key in COLUMNS)
        cells = [spread(column, "{:.3f}".format) for column in values]
        rows[name] = [*cells, "" if name in ROWS else below(results, bar)]
    return markdown(["row", *COLUMNS.values(), "below filter, seeds"], rows)


def below(results: list[Line], bar: list[float]) -> str:
    """In how many seeds the accuracies are below the filter's of the same seed."""
    counts = {
        key: sum(result[key] < least for result, least in zip(results, bar, strict=True))
        for key in ("running", "retrained")
    }
    return ", ".join(f"{key} {count}/{len(bar)}" for key, count in counts.items() if count)


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=PROBLEMS, default=["digits"], help="(digits)")
    add("--seeds", type=int, default=1, help="number of seeds (1)")
    add("--factors", type=float, nargs="+", default=FACTORS, help="of both rates (1/3 1 3)")
    where = "holds a folder per data set (beside the checkout, or cache)"
    add("--data-dir", type=command.folder, help=where)
    add("--output", type=Path, default=OUTPUT, help=f"finished runs ({OUTPUT})")
    add("--threads", type=int, default=1, help="torch threads (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    settings: list[Line] = [{"row": name} for name in ("validation", FILTER, "oracle")]
    for lower, upper in itertools.product(options.factors, repeat=2):
        settings.append({"lower": lower, "upper": upper})
    plans = {
        problem: [
            {"problem": problem, "seed": seed, **setting}
            for seed in range(options.seeds)
            for setting in settings
        ]
        for problem in options.problems
    }
    record = Record(options.output)
    for line in tqdm([line for plan in plans.values() for line in plan], file=sys.stderr):
        if line not in record:
            record.add(line, work(line, options.data_dir))
    for problem, plan in plans.items():
        print(f"\n{problem}\n\n{table(record, plan)}")
    print(f"\nSeeds 0 to {options.seeds - 1}; {command.machine()}")


if __name__ == "__main__":
    main()
