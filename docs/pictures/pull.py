"""The pull: where v goes that g leaves free, and what it does to the f in hand.

Left: g(u, v) = (v_1 + v_2 - u)^2 at u = 1 has a line of minimisers; f = |v - (1, 1)|^2 likes one of
them best. Right: one strength of weight decay per feature of scikit-learn's breast-cancer table,
200 training and 200 validation rows; f in hand, and at a v that was trained to the end.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import binary_cross_entropy_with_logits

from torch_penalty_bilevel import LeastSquares, PenaltyBilevelOptimizer, Stationarity
from torch_penalty_bilevel.nn import WeightDecay

SETTINGS = {  # upper rate, steps, share
    "rates 0.1 and 0.1": (0.1, 200, 0.3),
    "the same, without pull": (0.1, 200, 0.0),
    "rates 0.02 and 0.1": (0.02, 500, 0.3),
}


def way(share: float, steps: int = 400) -> torch.Tensor:
    """Points (steps + 1, 2) of v from (-1, 0.5), u held at 1."""
    u = torch.ones(1, requires_grad=True)
    v = torch.tensor([-1.0, 0.5], requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        torch.optim.SGD([u], lr=0.0),
        torch.optim.SGD([v], lr=0.2),
        penalty=Stationarity(LeastSquares(share=share)),
        allow_unused=True,
    )
    points = [v.detach().clone()]
    for _ in range(steps):
        optimizer.lower_step(lambda: (v - 1).square().sum(), lambda: (v.sum() - u[0]) ** 2)
        points.append(v.detach().clone())
    return torch.stack(points)


def in_hand_and_solved(setting: str, seed: int) -> tuple[float, float]:
    """The upper loss where ``step`` left v, and where L-BFGS ends from there."""
    upper_lr, steps, share = SETTINGS[setting]
    torch.manual_seed(seed)
    x, y = (torch.tensor(a).float() for a in load_breast_cancer(return_X_y=True))
    rows = torch.randperm(len(y))[:400]
    x, y = (x[rows] - x[rows[:200]].mean(0)) / x[rows[:200]].std(0), y[rows]
    model = torch.nn.Linear(30, 1)
    decay = WeightDecay(model, per="feature")

    def loss(part: slice) -> torch.Tensor:
        return binary_cross_entropy_with_logits(model(x[part])[:, 0], y[part])

    def f() -> torch.Tensor:
        return loss(slice(200, 400))

    def g() -> torch.Tensor:
        return loss(slice(0, 200)) + decay()

    optimizer = PenaltyBilevelOptimizer(
        decay.parameters(),
        model.parameters(),
        upper_lr=upper_lr,
        lower_lr=0.1,
        penalty=Stationarity(LeastSquares(share=share)),
    )
    for _ in range(steps):
        optimizer.step(f, g)
    in_hand = f().item()
    newton = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def again() -> torch.Tensor:
        newton.zero_grad()
        value = g()
        value.backward()
        return value

    newton.step(again)
    return in_hand, f().item()


def draw(folder: Path) -> None:
    """Both halves; prints the numbers of the right one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    _line_of_minimisers(left)
    _flattery(right)
    figure.savefig(folder / "pull.png", dpi=110)
    plt.close(figure)


def _line_of_minimisers(axes: Axes) -> None:
    ends = torch.tensor([-1.5, 1.8])
    axes.plot(ends, 1 - ends, color="C7", label="where v minimises g")
    for share, colour in ((0.0, "C3"), (0.3, "C0")):
        points = way(share)
        axes.plot(*points.T, color=colour, label=f"share={share:g}")
        axes.plot(*points[-1], "o", color=colour)
    axes.plot(1, 1, "*", color="black", markersize=10, label="what f likes best")
    axes.set(xlabel="v₁", ylabel="v₂", aspect="equal", xlim=(-1.5, 1.8), ylim=(-0.6, 2.2))
    axes.legend(fontsize="small")


def _flattery(axes: Axes) -> None:
    for place, setting in enumerate(SETTINGS):
        pairs = [in_hand_and_solved(setting, seed) for seed in range(3)]
        print(f"{setting}: in hand and solved {[tuple(round(f, 3) for f in p) for p in pairs]}")
        for seed, pair in enumerate(pairs):
            labels = ("f in hand", "v trained to the end") if place + seed == 0 else (None, None)
            for f, colour, label in zip(pair, ("C0", "C3"), labels, strict=True):
                axes.plot(place + 0.12 * (seed - 1), f, "o", color=colour, label=label)
    axes.set(xticks=range(len(SETTINGS)), ylabel="f", ylim=(0, None))
    axes.set_xticklabels([name.replace(", ", ",\n") for name in SETTINGS], fontsize="small")
    axes.legend(fontsize="small")
