"""Optuna: the loop around both levels, here over the learning rate of u.

    python -m examples.trainers.with_optuna

u: a weight decay per feature. v: a linear model. Trials are compared, and pruned, by f at the v
that is optimal for their u: the v at hand is pulled towards what f likes and would flatter. Here
that v has a closed form; elsewhere train a copy of v on g for a while.
"""

from __future__ import annotations

import optuna
import torch
from torch import Tensor

from torch_penalty_bilevel import PenaltyBilevelOptimizer

FEATURES, ROUNDS, STEPS = 8, 5, 20


class Ridge:
    """f(u, v) = |X' v - y'|^2 / n', g(u, v) = |X v - y|^2 / n + sum_i exp(u_i) v_i^2."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(60, FEATURES, generator=generator, dtype=torch.float64)
        y = X[:, 0] - X[:, 1] + torch.randn(60, generator=generator, dtype=torch.float64)
        self.train, self.valid = (X[:20], y[:20]), (X[20:], y[20:])
        self.u = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        self.v = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)

    def upper(self, v: Tensor | None = None) -> Tensor:
        """The loss f, at the v at hand or another."""
        X, y = self.valid
        return (X @ (self.v if v is None else v) - y).square().mean()

    def lower(self) -> Tensor:
        """The loss g."""
        X, y = self.train
        return (X @ self.v - y).square().mean() + self.u.exp() @ self.v.square()

    def resolved(self) -> float:
        """f(u, v*(u)); v* solves (X'X / n + diag exp u) v = X'y / n."""
        X, y = self.train
        with torch.no_grad():
            H = X.T @ X / len(X) + self.u.exp().diag()
            return float(self.upper(torch.linalg.solve(H, X.T @ y / len(X))))


def objective(trial: optuna.Trial) -> float:
    """Of one learning rate: f, re-solved, after all rounds."""
    task, rate = Ridge(), trial.suggest_float("upper_lr", 1e-4, 1.0, log=True)
    optimizer = PenaltyBilevelOptimizer([task.u], [task.v], upper_lr=rate, lower_lr=0.05)
    for number in range(ROUNDS):
        for _ in range(STEPS):
            optimizer.step(task.upper, task.lower)
        trial.report(task.resolved(), number)
        if trial.should_prune():
            raise optuna.TrialPruned
    return task.resolved()


def main(trials: int = 12) -> optuna.Study:
    """Search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    found = main()
    print(f"upper_lr {found.best_params['upper_lr']:.2g}, f re-solved {found.best_value:.4f}")
