"""``python -m examples.synthetic``: its formulas, its methods, and what there is to see."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from small_runs import ran, run_of

from benchmarks import smd
from examples.synthetic import __main__ as synthetic
from examples.synthetic import formulation, methods, report
from examples.synthetic.formulation import FORMULAS

pytestmark = pytest.mark.filterwarnings("ignore::torch_penalty_bilevel.BilevelWarning")


def evaluated(formula, u, v, A, P):
    """A formula of ``FORMULAS``, read by a program: products with A and P, squares, norms."""
    text = formula.replace("½", "0.5").replace("√", "math.sqrt")
    text = re.sub(r"([AP])(?=[uv(])", r"\1@", text)
    text = re.sub(r"\|([^|]+)\|²", r"square(\1)", text)
    text = re.sub(r"(\([^()]+\)|[uv])²", r"square(\1)", text)
    names = {"math": math, "square": lambda x: float(x @ x), "u": u, "v": v, "A": A, "P": P}
    return float(eval(text, names))


def root(of, size):
    """A matrix R with R'R = A'A, from g's Hessian in v, 2 A'A; and the projector on its rows."""
    H = torch.func.hessian(of.lower_loss, argnums=1)(*(torch.zeros(size).double(),) * 2).numpy()
    values, vectors = np.linalg.eigh(H / 2)
    seen = vectors[:, values > 1e-9 * values.max()]
    return np.sqrt(values.clip(0))[:, None] * vectors.T, seen @ seen.T


class TestFormulation:
    @pytest.mark.parametrize("name", FORMULAS)
    def test_what_is_written_is_what_is_computed(self, name):
        of = formulation.problem(name, 3)
        u, v = (x.detach() for x in formulation.start(of, 3))
        A, P = root(of, len(u))
        assert np.linalg.matrix_rank(P) == {"figure1": 1, "smd20": 20, "smd21": 20}.get(name, 10)
        written = [evaluated(text, u.numpy(), v.numpy(), A, P) for text in FORMULAS[name]]
        computed = of.upper_loss(u, v), of.lower_loss(u, v), formulation.error(of, u, v)
        assert written == pytest.approx([float(x) for x in computed], rel=1e-9)

    @pytest.mark.parametrize("name", FORMULAS)
    def test_a_start_is_uniform_in_the_box(self, name):
        of = formulation.problem(name, 0)
        starts = torch.stack(
            [torch.cat(formulation.start(of, seed)) for seed in range(200)]
        ).detach()
        assert float(starts.abs().max()) < 5
        # The standard deviation of 200 or more numbers: to a tenth.
        assert float(starts.std()) == pytest.approx(10 / math.sqrt(12), rel=0.1)

    def test_a_seed_draws_its_own_matrix_and_start(self):
        u, v = (torch.ones(20).double(), torch.zeros(20).double())
        values = [float(formulation.problem("smd22", seed).lower_loss(u, v)) for seed in (0, 0, 1)]
        assert values[0] == values[1] != values[2]
        of = formulation.problem("smd22", 0)
        starts = [formulation.start(of, seed)[0] for seed in (0, 0, 1)]
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


def perform(folder, problem, method, budget, seed=100, **knobs):
    known = methods.METHODS[method]
    line = {"problem": problem, "method": method, "seed": seed, "budget": budget}
    line |= {"rate": known.rate, "steps": known.steps} | knobs
    return methods.perform(line, run_of(method, folder))


class TestMethods:
    def test_the_curvature_is_that_of_the_matrix(self):
        of = formulation.problem("smd24", 5)
        u, v = formulation.start(of, 5)
        A, _ = root(of, 20)
        expected = 2 * np.linalg.norm(A, 2) ** 2
        assert methods.curvature(of, u, v) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("method", methods.METHODS)
    def test_every_method_spends_its_budget_and_is_seen_evenly(self, method, tmp_path):
        result = perform(tmp_path, "smd20", method, 400)
        assert len(result["path"]) == methods.LOOKS + 1
        assert result["error"] == result["path"][-1]
        assert 400 <= result["evaluations"] < 400 + 100
        of = formulation.problem("smd20", 100)
        assert result["path"][0] == formulation.error(of, *formulation.start(of, 100))

    @pytest.mark.parametrize("method", ["penalty", "approx_grad"])
    def test_methods_that_follow_the_hypergradient_come_to_the_solution(self, method, tmp_path):
        result = perform(tmp_path, "figure1", method, 2000)
        assert result["error"] < 1e-2 * result["path"][0]

    def test_an_error_of_the_method_is_an_infinite_error(self, tmp_path):
        result = perform(tmp_path, "smd21", "paper", 3000, rate=1e200)
        assert result["error"] == math.inf
        assert len(result["path"]) == methods.LOOKS + 1
        assert math.isfinite(result["path"][0])


class TestWhatItShows:
    @pytest.mark.parametrize("name", ["figure1", "smd21", "smd22", "smd23"])
    def test_f_has_no_slope_in_u_on_the_lower_solutions(self, name):
        of = formulation.problem(name, 1)
        u, _ = formulation.start(of, 1)
        (slope,) = torch.autograd.grad(of.upper_loss(u, of.best_lower(u.detach())), u)
        assert float(slope.norm()) < 1e-9 * float(u.detach().norm())

    def test_alternating_stops_where_v_has_come_to_u(self, tmp_path):
        result = perform(tmp_path, "smd21", "alternating", 2000)
        half = len(result["path"]) // 2
        assert result["error"] > 1
        assert result["path"][half] == pytest.approx(result["error"], rel=1e-3)

    def test_alternating_ends_in_its_own_fixed_point(self, tmp_path):
        # SMD20: the slope of f in u is 2 u, and v = 1 - u follows: u = 0, v = 1.
        result = perform(tmp_path, "smd20", "alternating", 3000)
        assert result["error"] == pytest.approx(math.sqrt(40 * 0.25), rel=0.02)

    def test_only_the_pull_moves_v_in_the_null_space(self, tmp_path):
        free, pulled = (
            perform(tmp_path, "smd23", method, 2000) for method in ("penalty_no_pull", "penalty")
        )
        of = formulation.problem("smd23", 100)
        _, v = formulation.start(of, 100)
        _, P = root(of, 20)
        unseen = np.linalg.norm(v.detach().numpy() @ (np.eye(20) - P))
        assert free["error"] > 0.3 * unseen
        assert pulled["error"] < 0.5 * free["error"]


class TestReport:
    def test_the_table_by_hand(self):
        runs = [
            {
                "run": {"problem": "smd21", "method": method, "seed": seed, "budget": 50},
                "result": {"error": error, "path": [9.0, error], "seconds": 1.0 + seed},
            }
            for method, errors in {"penalty": (1e-3, 3e-3, 2e-3), "paper": (math.inf,) * 3}.items()
            for seed, error in enumerate(errors)
        ]
        text = report.section({"runs": runs})
        assert "| penalty | 2.0e-03 (1.0e-03 to 3.0e-03) | 2.0 |" in text
        assert "| paper | inf | 2.0 |" in text
        assert "re-run once | 1.4e-02 |  |" in text
        assert "over 3 starts" in text
        assert "- smd24: `f = |u|² + |v|²`, `g = |A(1 - u - v)|²`; error" in text


def test_a_small_run_leaves_all_that_it_promises(tmp_path, monkeypatch, capsys):
    words = ["synthetic", "--problems", "smd20", "--method", "penalty", "alternating"]
    found = ran(synthetic, words, tmp_path / "out", monkeypatch, capsys)
    assert found["penalty"]["error"] < 0.5 * found["penalty"]["path"][0]


def test_a_device_that_is_of_no_use_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["synthetic", "--device", "cuda"])
    with pytest.raises(SystemExit):
        synthetic.parse()
    assert "--device cuda: these problems are too small for any but cpu" in capsys.readouterr().err


def test_the_benchmark_runs_the_same_problems():
    of = formulation.problem("smd22", 4)
    assert smd.final_error(22, "default", 4, outer=1, lr=0.0) == formulation.error(
        of, *formulation.start(of, 4)
    )
