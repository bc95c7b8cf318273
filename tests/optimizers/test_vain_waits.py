"""``lower_steps="auto"`` whose certificate never comes, as with minibatches or kinks."""

import copy
import warnings

import pytest
from stepping import build, quadratic_f, quadratic_g, start

from torch_penalty_bilevel import BilevelWarning

VAIN = r'lower_steps="auto" has taken all'


class Noisy:
    """Each call of ``step`` has an f of its own: the multiplier of the last is worth nothing."""

    def __init__(self, **options):
        options = {"lower_steps": "auto", "max_lower_steps": 2} | options
        self.u, self.v, self.optimizer = build(*start(), upper_lr=1e-3, lower_lr=1e-3, **options)
        self.sign = 1.0

    def calls(self, count):
        """Whether each of them warned."""
        warned = []
        for _ in range(count):
            self.sign = -self.sign
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.optimizer.step(
                    lambda: self.sign * quadratic_f(self.u, self.v),
                    lambda: quadratic_g(self.u, self.v),
                )
            warned.append([str(w.message) for w in caught])
        assert all(VAIN in text for texts in warned for text in texts)
        return [len(texts) for texts in warned]


def test_it_is_said_at_the_twentieth_call_and_once():
    assert Noisy().calls(70) == [0] * 19 + [1] + [0] * 50


def test_the_numbers_and_remedies():
    run = Noisy(certificate_tolerance=0.03)
    run.calls(19)
    run.sign = -run.sign
    both = lambda: run.sign * quadratic_f(run.u, run.v), lambda: quadratic_g(run.u, run.v)
    with pytest.warns(BilevelWarning) as caught:
        run.optimizer.step(*both)
    text = str(caught[0].message)
    share = float(run.optimizer.metrics.relative_certificate)
    assert share > 0.5
    assert f"still {share:.2g} of ||grad_v f||" in text
    for part in ("max_lower_steps=2 ", "20 calls in a row", "tolerance is 0.03", "lower_steps=5"):
        assert part in text
    assert "docs/symptoms.md" in text


def test_a_certified_call_begins_the_count_anew():
    run = Noisy()
    assert run.calls(19) == [0] * 19
    tolerance, run.optimizer.certificate_tolerance = run.optimizer.certificate_tolerance, 0.999999
    while not run.optimizer._counts["certified"]:
        run.sign = -run.sign  # one f for several calls
        run.calls(1)
    run.optimizer.certificate_tolerance = tolerance
    assert run.calls(20) == [0] * 19 + [1]


def test_the_warm_up_is_another_wait():
    run = Noisy(warmup_steps=30, max_lower_steps=1)
    assert run.calls(55) == [0] * (30 + 19) + [1] + [0] * 5


def test_a_number_of_steps_waits_for_nothing():
    assert Noisy(lower_steps=2).calls(25) == [0] * 25


def test_a_resumed_run_says_it_when_the_other_would():
    run = Noisy()
    run.calls(15)
    other = Noisy()
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.sign = run.sign
    assert other.calls(6) == run.calls(6) == [0] * 4 + [1, 0]
