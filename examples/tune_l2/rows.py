"""What ``tune_l2`` compares with: one L2 weight for all features, and none."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from examples.shared.record import Line
from examples.tune_l2.problem import Problem

GLOBAL_WEIGHTS = 10.0 ** np.arange(-3, 3.5, 0.5)
ROWS = {"one_weight": GLOBAL_WEIGHTS, "no_l2": np.zeros(1)}


def simple(problem: Problem, weights: np.ndarray) -> Line:
    """The best of ``weights``, also fitted again on training and validation rows."""
    v, row = one_weight(problem, weights)
    if row["weight"] > 0:
        u = torch.full_like(problem.start()[0], math.log(row["weight"]))
        both = problem.train.joined(problem.validation)
        row["refit"] = problem.test.accuracy(problem.solved(u, v, both))
    return row


def one_weight(problem: Problem, weights: np.ndarray = GLOBAL_WEIGHTS) -> tuple[Tensor, Line]:
    """Scikit-learn's softmax regression with one L2 weight, the best of a grid on validation.

    Args:
        problem: the data.
        weights: exp(u), the same for every feature; 0 is no L2 at all.

    Returns:
        Its coefficients (d, k), and what ``tune_l2`` reports of a row.
    """
    began, found = time.process_time(), []
    for weight in weights:
        # scikit-learn minimises C * sum of losses + ||v||^2 / 2, and for two classes in place of
        # v its difference of columns w: v = (-w, w) / 2 and ||v||^2 = ||w||^2 / 2.
        size = problem.features * problem.classes * (2 if problem.classes == 2 else 1)
        strength = np.inf if weight == 0 else size / (weight * len(problem.train.targets))
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000, tol=1e-6)
        with warnings.catch_warnings():  # without L2 there may be no minimiser to converge to
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(problem.train.values, problem.train.targets)
        coefficients = model.coef_
        if problem.classes == 2:
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
        v = torch.from_numpy(coefficients.T.copy()).to(problem.train.device, problem.dtype)
        found.append((problem.validation.loss(v).item(), float(weight), v))
    loss, weight, v = min(found, key=lambda entry: entry[0])
    row = {"validation": loss, "test": problem.test.accuracy(v), "weight": weight}
    return v, row | {"seconds": time.process_time() - began}
