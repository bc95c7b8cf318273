"""One meta-iteration of the few-shot example: its hypergradient, and when v counts as solved."""

from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

for library in ("PIL", "pooch", "requests", "tqdm"):
    pytest.importorskip(library)

import few_shot as tiny  # noqa: E402

from examples.few_shot.encoders import Shift, normalised_by  # noqa: E402
from examples.few_shot.formulation import meta_step, penalty_optimizer  # noqa: E402
from torch_penalty_bilevel import functional  # noqa: E402


def test_the_upper_gradient_is_the_hypergradient_at_the_lower_solution():
    task, given = tiny.bilevel(), tiny.images()
    start = {name: p.detach().clone() for name, p in task.encoder.named_parameters()}
    optimizer = penalty_optimizer(task, upper_lr=1e-3)
    taken = meta_step(task, optimizer, given, tolerance=1e-9, most=2000)
    assert taken < 2000
    twin = tiny.encoder()

    def losses(images, decay):
        def loss(upper, lower):
            with normalised_by(twin, "batch"):
                phi = functional_call(twin, upper, (images,)).unflatten(0, (2, -1))
            scores = phi @ lower[0].mT + lower[1][:, None]
            labels = torch.arange(3).repeat_interleave(scores.shape[1] // 3).repeat(2)
            size = sum(part.square().sum() for part in lower)
            return cross_entropy(scores.flatten(0, 1), labels) + decay / 4 * size

        return loss

    lower = tuple(p.detach() for p in task.heads.parameters())
    both = losses(given.query, 0.0), losses(given.support, tiny.DECAY)
    exact, _ = functional.hypergradient(
        *both, start, lower, method="cg", max_iterations=200, tolerance=1e-12
    )
    slopes = torch.func.grad(both[1], argnums=1)(start, lower)
    assert max(slope.abs().max() for slope in slopes) < 1e-8  # v is solved
    for name, parameter in task.encoder.named_parameters():
        # To the tolerance of the certificate, relative to the largest entries.
        torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-6, atol=1e-8)


def test_steps_until_the_certificate_and_the_residual_are_there():
    taken = {}
    for tolerance in (0.5, 0.05, 0.005):
        task = tiny.bilevel()
        optimizer = penalty_optimizer(task, upper_lr=1e-3)
        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            whole = optimizer.lower_step

            def lower_step(f, g, whole=whole, sizes=sizes, optimizer=optimizer):
                whole(f, g)
                seen = optimizer.metrics
                sizes.append((float(seen.relative_certificate), float(seen.residual_norm)))

            patch.setattr(optimizer, "lower_step", lower_step)
            taken[tolerance] = meta_step(task, optimizer, tiny.images(), tolerance, most=500)
        solved = [c <= tolerance and r <= tolerance * sizes[0][1] for c, r in sizes]
        assert solved == [False] * (taken[tolerance] - 1) + [True]
    assert taken[0.5] < taken[0.05] < taken[0.005]
    assert meta_step(task, optimizer, tiny.images(1), 0.0, most=7) == 7


def test_features_are_computed_once_and_lower_steps_see_numbers():
    task = tiny.bilevel()
    calls = []
    task.encoder.register_forward_hook(lambda *_: calls.append(1))
    optimizer = penalty_optimizer(task, upper_lr=1e-3)
    for number in range(3):
        calls.clear()
        meta_step(task, optimizer, tiny.images(number), tolerance=1e-3, most=100)
        assert len(calls) == 2  # support and query
    with task.held():
        assert not task.features.support.requires_grad
    assert task.features.support.requires_grad
    assert int(next(m for m in task.encoder.modules() if isinstance(m, Shift)).batches) == 6


def test_both_must_be_solved():
    """The certificate first, then the residual, then both."""
    script = iter([(0.3, 8.0), (0.1, 4.0), (0.1, 2.0), (0.3, 0.5), (0.2, 1.6), (0.0, 0.0)])

    class Scripted:
        metrics = SimpleNamespace(gradient_evaluations=0)
        done = ()

        def restart_lower(self):
            self.done += ("restart",)

        def lower_step(self, f, g):
            certificate, residual = next(script)
            self.metrics = SimpleNamespace(
                relative_certificate=torch.tensor(certificate),
                residual_norm=torch.tensor(residual),
                gradient_evaluations=1,
            )

        def upper_step(self, f, g):
            self.done += ("upper",)

    optimizer = Scripted()
    # 0.2 and 1.6 = 0.2 * 8 are the first that both are small enough; equal counts.
    tolerance = float(torch.tensor(0.2))
    assert meta_step(tiny.bilevel(), optimizer, tiny.images(), tolerance, most=100) == 5
    assert optimizer.done == ("restart", "upper")
