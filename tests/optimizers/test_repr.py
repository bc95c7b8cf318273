"""``repr`` of both optimizers and of their metrics says what a person wants to know."""

import pytest
import torch
from torch.optim import SGD, Adam

from torch_penalty_bilevel import HypergradientOptimizer, Metrics, PenaltyBilevelOptimizer


def tensors():
    u = torch.zeros(3, requires_grad=True)
    v = [torch.ones(2, 600, requires_grad=True), torch.ones(1, requires_grad=True)]
    return u, v


def closures(u, v):
    return (
        lambda: (v[0].sum() - 1) ** 2 + v[1].sum() ** 2,
        lambda: (v[0] ** 2).sum() / 2 + (v[1] - u.sum()).square().sum() / 2,
    )


def summary(optimizer):
    head, *lines = repr(optimizer).split("\n")
    lines = lines[: lines.index("Parameter Group 0")]
    return head, dict(line.strip().split(": ", 1) for line in lines)


@pytest.mark.parametrize("kind", [PenaltyBilevelOptimizer, HypergradientOptimizer])
def test_before_the_first_step(kind):
    u, v = tensors()
    v[1].requires_grad_(False)
    rules = [SGD([v[0]], lr=0.25), Adam([{"params": [v[1]], "lr": 2.0}], lr=0.5)]
    optimizer = kind([u], rules, upper_lr=0.125)
    head, said = summary(optimizer)
    assert head == f"{kind.__name__} ("
    assert said["upper"] == "1 tensor, 3 numbers; Adam, lr 0.125"
    assert said["lower"] == (
        "2 tensors, 1,201 numbers, 1 tensor frozen; SGD, lr 0.25 and Adam, lr 2"
    )
    assert said["curvature"] == "auto, now double_backward: no product has been taken yet"
    assert said["progress"] == "0 steps, 0 gradient evaluations; no metrics yet"
    # Torch's own list of groups is below.
    assert repr(optimizer).count("Parameter Group ") == 3
    assert "    level: lower" in repr(optimizer)


def test_groups_of_several_rates_are_told_apart():
    u, v = tensors()
    groups = [{"params": [v[0]], "lr": 0.5}, {"params": [v[1]], "lr": 0.25}]
    assert summary(PenaltyBilevelOptimizer([u], groups))[1]["lower"].endswith("lr 0.5 | 0.25")


def test_after_a_step():
    u, v = tensors()
    optimizer = PenaltyBilevelOptimizer([u], v, curvature="double_backward", lower_steps=2)
    optimizer.step(*closures(u, v))
    _, said = summary(optimizer)
    seen = optimizer.metrics.as_dict()
    assert said["penalty"] == "stationarity by LeastSquares, lower_steps=2"
    assert said["curvature"] == "double_backward"
    assert said["progress"] == (
        f"1 step, {seen['gradient_evaluations']:.0f} gradient evaluations; "
        f"last f {seen['upper_loss']:.4g}, g {seen['lower_loss']:.4g}, "
        f"certificate {seen['adjoint_residual_norm']:.3g} "
        f"({seen['relative_certificate']:.2g} of ||grad_v f||), "
        f"hypergradient {seen['upper_grad_norm']:.3g}"
    )
    other = PenaltyBilevelOptimizer(*map(list, ([u], v)), curvature="double_backward")
    other.load_state_dict(optimizer.state_dict())
    assert summary(other)[1]["progress"].startswith("1 step, ")
    assert summary(other)[1]["progress"].endswith("; no metrics yet")


def test_the_method_and_its_steps():
    u, v = tensors()
    optimizer = HypergradientOptimizer([u], v, method="cg", lower_steps=lambda k: k + 1)
    optimizer.step(*closures(u, v))
    _, said = summary(optimizer)
    assert said["method"] == "cg, lower_steps=a schedule"
    assert said["progress"].startswith("1 step, ")


def test_metrics_are_a_table_of_all_numbers_with_their_units():
    u, v = tensors()
    optimizer = PenaltyBilevelOptimizer([u], v)
    optimizer.lower_step(*closures(u, v))
    metrics = optimizer.metrics
    first, *rows, last = repr(metrics).split("\n")
    assert (first, last) == ("Metrics(", ")")
    found = {name: value for name, value, *_ in map(str.split, rows)}
    assert found == {name: f"{value:.6g}" for name, value in metrics.as_dict().items()}
    assert found["upper_grad_norm"] == "nan"  # a lower step has no use for it
    assert float(found["lower_loss"]) == 600.5  # 1200 / 2 + 1 / 2
    assert all(len(row.split()) > 2 for row in rows)  # each says what it is
    assert str(metrics) == repr(metrics)


def test_metrics_before_the_first_step_are_nan():
    assert repr(Metrics.unknown()).count(" nan ") == 9
