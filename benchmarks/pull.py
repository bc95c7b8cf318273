"""What the pull of v towards f does to a network: where it helps, where it ruins.

    python -m benchmarks.pull                          # both problems, ten seeds
    python -m benchmarks.pull --problems decay --seeds 2 --steps 100

"decay": one L2 weight per matrix of a ReLU network (30-32-16-2) on scikit-learn's breast-cancer
table, 150 training rows of which 15 % have the other label, 150 validation rows, the rest for
testing; no batches, one lower step, Adam 0.01 on both levels. f where g is solved anew from the
network's start, beside the best of five strengths that all matrices share; "ruined" where that f is
more than 0.1 above this best. "cleaning": one weight per image of 1,000 digits of which 40 % have
the next class as label, 100 trusted ones, a network with BatchNorm and dropout, batches of 64, Adam
0.05 above and 0.005 below; the share of labels told right, at the end and at a third of the steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from examples.shared import command
from examples.shared.table import markdown, spread
from torch_penalty_bilevel import (
    BilevelWarning,
    LeastSquares,
    PenaltyBilevelOptimizer,
    Stationarity,
)
from torch_penalty_bilevel.nn import SampleWeights, WeightDecay

SHARES = 0.3, 0.1, 0.0
STRENGTHS = -7.0, -5.0, -4.0, -3.0, -2.0
RUINED = 0.1


def optimizer_of(
    upper: nn.Module, lower: nn.Module, share: float, **rates: float
) -> PenaltyBilevelOptimizer:
    penalty = Stationarity(LeastSquares(share=share))
    levels = upper.parameters(), lower.parameters()
    return PenaltyBilevelOptimizer(*levels, penalty=penalty, **rates)


class Decay:
    """Data and start of one seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        x, y = (torch.tensor(a) for a in load_breast_cancer(return_X_y=True))
        order = torch.randperm(len(y))
        x, y = ((x - x.mean(0)) / x.std(0)).float()[order], y[order]
        wrong = torch.rand(150) < 0.15
        self.training = x[:150], torch.where(wrong, 1 - y[:150], y[:150])
        self.validation, self.test = (x[150:300], y[150:300]), (x[300:], y[300:])
        self.start = self.network().state_dict()

    @staticmethod
    def network() -> nn.Sequential:
        widths = nn.Linear(30, 32), nn.Linear(32, 16), nn.Linear(16, 2)
        return nn.Sequential(widths[0], nn.ReLU(), widths[1], nn.ReLU(), widths[2])

    @staticmethod
    def loss(network: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(network(data[0]), data[1])

    def started(self) -> tuple[nn.Sequential, WeightDecay]:
        network = self.network()
        network.load_state_dict(self.start)
        return network, WeightDecay(network, per="tensor", initial=0.01)

    def solved(self, logs: Sequence[float] | Tensor, steps: int = 600) -> tuple[float, float]:
        """Validation and test loss of a network that is trained with these strengths alone."""
        network, decay = self.started()
        with torch.no_grad():
            decay.log_strengths.copy_(torch.as_tensor(logs))
        rule = torch.optim.Adam(network.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps)
        for _ in range(steps):
            rule.zero_grad()
            (self.loss(network, self.training) + decay()).backward()
            rule.step()
            schedule.step()
        with torch.no_grad():
            parts = self.validation, self.test
            validation, test = (float(self.loss(network, part)) for part in parts)
        return validation, test

    def learned(self, share: float, steps: int, rate: float) -> tuple[float, float, float]:
        """The upper loss in hand, and with g solved anew; the test loss there."""
        network, decay = self.started()
        optimizer = optimizer_of(decay, network, share, upper_lr=rate, lower_lr=0.01)
        for _ in range(steps):
            optimizer.step(
                lambda: self.loss(network, self.validation),
                lambda: self.loss(network, self.training) + decay(),
            )
        in_hand = float(self.loss(network, self.validation))
        return in_hand, *self.solved(decay.log_strengths.detach())


def short(number: float) -> str:
    return f"{number:.3f}"


def decays(seeds: int, steps: int) -> str:
    problems = [Decay(seed) for seed in range(seeds)]
    shared = [
        min(p.solved([s] * 3) for s in STRENGTHS)
        for p in tqdm(problems, desc="one strength", leave=False)
    ]
    best, tests = ([pair[i] for pair in shared] for i in (0, 1))
    table = {"the best of five for all": ["", spread(best, short), "", spread(tests, short)]}
    rows = {f"share={share}": (share, 0.01) for share in SHARES}
    rows["share=0.3, a fifth of the upper rate"] = 0.3, 0.002
    for name, (share, rate) in rows.items():
        bar = tqdm(problems, desc=name, leave=False)
        hands, ends, tests = map(
            list, zip(*(p.learned(share, steps, rate) for p in bar), strict=True)
        )
        ruined = sum(end > least + RUINED for end, least in zip(ends, best, strict=True))
        told = spread(hands, short), spread(ends, short), f"{ruined} of {seeds}"
        table[name] = [*told, spread(tests, short)]
    return markdown(["", "f in hand", "f, solved anew", "ruined", "test loss, solved anew"], table)


def told_right(share: float, seed: int, steps: int) -> tuple[float, float]:
    """At a third of the steps, and at the end."""
    torch.manual_seed(seed)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(y))[:1100]
    x, y = x[order].float() / 16, y[order]
    wrong = torch.rand(1000) < 0.4
    given = torch.where(wrong, (y[:1000] + 1) % 10, y[:1000])
    layers = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)
    network, weights = nn.Sequential(*layers), SampleWeights(1000)
    optimizer = optimizer_of(weights, network, share, upper_lr=0.05, lower_lr=0.005)

    def lower(rows: Tensor) -> Tensor:
        losses = cross_entropy(network(x[rows]), given[rows], reduction="none")
        decay = sum(p.square().sum() for p in network.parameters())
        return weights.weighted_mean(losses, rows) + 1e-3 * decay

    told = []
    for step in range(1, steps + 1):
        rows = torch.randint(0, 1000, (64,))
        optimizer.step(
            lambda: cross_entropy(network(x[1000:]), y[1000:]), lambda rows=rows: lower(rows)
        )
        if step in (steps // 3, steps):
            told.append(float(((weights().detach() < 0.5) == wrong).float().mean()))
    return told[0], told[-1]


def cleanings(seeds: int, steps: int) -> str:
    table = {}
    for share in SHARES:
        bar = tqdm(range(seeds), desc=f"cleaning, share={share}", leave=False)
        ends = zip(*(told_right(share, seed, steps) for seed in bar), strict=True)
        table[f"share={share}"] = [spread(list(end), short) for end in ends]
    return markdown(["", f"told right, {steps // 3} steps", f"{steps} steps"], table)


PROBLEMS: dict[str, tuple[Callable[[int, int], str], int]] = {
    "decay": (decays, 600),
    "cleaning": (cleanings, 900),
}


def main() -> None:
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=command.count, default=10)
    parser.add_argument("--steps", type=command.count, help="of u; default: 600 and 900")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", BilevelWarning)  # of a certificate that is large for long
    for name in options.problems:
        run, steps = PROBLEMS[name]
        print(f"{name}\n\n{run(options.seeds, options.steps or steps)}\n", flush=True)
    print(f"Seeds 0 to {options.seeds - 1}; {command.machine()}")


if __name__ == "__main__":
    main()
