"""5-way 1-shot Omniglot with a shared representation for ``race.py``.

u: a network of three convolutions, 19,008 numbers, from 14 x 14 pixels to features phi of unit
length times SCALE. v: the heads of a meta-batch, one softmax regression v_t (5, 288) per task:

    g(u, v) = mean over tasks t of (cross entropy of the support set + DECAY ||v_t||^2 / 2)
    f(u, v) = mean over tasks t of  cross entropy of the query set

Every u-step draws new tasks: classes of the background alphabets, each turned by 0, 90, 180 or 270
degrees, with 1 image per class to fit the head and 5 to judge it. Heads start at 0. While v moves
and u does not, methods whose interface has a place for it compute phi once: the penalty, torchopt
and higher; ours with reference implementations compute phi of the support images in every v-step.

The score of u: the test accuracy on 1,000 fixed tasks of characters never seen, after a fresh head
per task was fitted to the end of g. Rates are chosen on characters of background alphabets that
are left out when they are chosen and that no run trains on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from benchmarks.race.methods import methods_of
from benchmarks.race.problem import Grid, Method, Picture
from benchmarks.race.problem import Problem as RaceProblem
from examples.data.mirrors import default_folder
from examples.data.omniglot import omniglot
from examples.shared.episodes import class_by_class, drawn, mean_cross_entropy
from examples.shared.record import Line
from examples.shared.solvers import Solver
from examples.shared.task import Rates, Values

GRID = Grid(lower=(0.03, 0.1), gradient=(1.0, 3.0), upper=(3e-3, 1e-2), lower_steps=(5, 1, 20))
WAYS, QUERIES, TASKS = 5, 5, 4
CHANNELS, SCALE, DECAY = 32, 5.0, 0.5
TRAINING, TEST_TASKS = 800, 1000


class Problem(NamedTuple):
    """Images (classes, drawers, 1, 14, 14) in [0, 1]."""

    train: Tensor
    """A character turned is another class."""
    test: Tensor
    """One to fit a head and ``QUERIES`` to judge it, of each character."""
    tasks: Tensor
    """Classes of each test task."""
    seed: int


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """The images of all characters, and which are of the evaluation alphabets."""
    bits, _, held_out = omniglot(folder)
    pixels = bits.view(-1, 1, 28, 28).float()
    return avg_pool2d(pixels, 2).view(len(bits), -1, 1, 14, 14), held_out


def make_problem(data: tuple[Tensor, Tensor], seed: int, tuning: bool) -> Problem:
    """Background characters to learn from; in tuning the others of them are the test."""
    images, held_out = data
    background = images[~held_out]
    train = background[:TRAINING]
    test = background[TRAINING:] if tuning else images[held_out]
    turned = torch.cat([train.rot90(k, (-2, -1)) for k in range(4)])
    generator = torch.Generator().manual_seed(seed)
    tasks = [torch.randperm(len(test), generator=generator)[:WAYS] for _ in range(TEST_TASKS)]
    chosen = torch.randperm(images.shape[1], generator=generator)[: 1 + QUERIES]
    return Problem(turned, test[:, chosen], torch.stack(tasks), seed)


def make_network(seed: int) -> nn.Sequential:
    """Three convolutions; group norm, so that no image sees another."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for inputs, pool in ((1, True), (CHANNELS, True), (CHANNELS, False)):
        parts += [nn.Conv2d(inputs, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if pool else []
    # No ReLU at the end, as in the paper; higher's Adam has NaN for entries that are always 0.
    return nn.Sequential(*parts[:-1], nn.Flatten())


class Heads(nn.Module):
    """V as a module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.zeros(TASKS, WAYS, size))


class Task:
    """One run; the seed's network and heads at 0."""

    upper_constraint = None
    is_new = True
    # phi has length SCALE, so a task's cross entropy curves by at most SCALE^2 / 2.
    gradient_unit = TASKS / (SCALE**2 / 2 + DECAY)
    adjoint_step = gradient_unit

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.network = make_network(problem.seed)
        self.names = [name for name, _ in self.network.named_parameters()]
        self.upper = list(self.network.parameters())
        size = self.network(problem.train[0, :1]).shape[1]
        self.module = Heads(size)
        self.lower = list(self.module.parameters())
        self.held: tuple[Tensor, Tensor] | None = None
        torch.manual_seed(problem.seed)
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """New tasks, heads at 0."""
        self.lower[0].zero_()
        images = self.problem.train
        chosen = images[drawn(len(images), images.shape[1], TASKS * WAYS, 1 + QUERIES)]
        self.support, self.query = chosen[:, 0], chosen[:, 1:].flatten(0, 1)

    def draw(self) -> None:
        """The tasks at hand stay until the u-step."""

    def features(self, images: Tensor, u: Values | None = None) -> Tensor:
        """Phi, (n, size)."""
        if u is None:
            return SCALE * normalize(self.network(images))
        named = dict(zip(self.names, u, strict=True))
        return SCALE * normalize(torch.func.functional_call(self.network, named, (images,)))

    def upper_loss(self, v: Values | None = None, u: Values | None = None) -> Tensor:
        features = self.held[1] if self.held else self.features(self.query, u)
        return self._cross_entropy(features, (v or self.lower)[0])

    def lower_loss(
        self, v: Values | None = None, u: Values | None = None, batch: None = None
    ) -> Tensor:
        features = self.held[0] if self.held else self.features(self.support, u)
        (heads,) = v or self.lower
        return self._cross_entropy(features, heads) + DECAY / 2 * heads.square().sum() / TASKS

    def _cross_entropy(self, features: Tensor, heads: Tensor) -> Tensor:
        """Of images that come by task, then class."""
        return mean_cross_entropy(features.view(TASKS, -1, features.shape[1]) @ heads.mT, WAYS)

    @contextlib.contextmanager
    def held_upper(self, graph: bool = False) -> Iterator[None]:
        with torch.set_grad_enabled(graph):
            self.held = self.features(self.support), self.features(self.query)
        try:
            yield
        finally:
            self.held = None


@torch.no_grad()
def look(task: Task) -> Line:
    """Test accuracy with fresh heads."""
    problem = task.problem
    features = task.features(problem.test.flatten(0, 1)).view(*problem.test.shape[:2], -1)
    return {"accuracy": accuracy(features, problem.tasks)}


def accuracy(features: Tensor, tasks: Tensor) -> float:
    """Mean over ``tasks`` of (characters, 1 + queries, size), a head fitted to each."""
    support, queries = features[tasks][:, :, 0], features[tasks][:, :, 1:]
    kernel = support @ support.mT
    logits = torch.einsum("tcqd,tkd,tkj->tcqj", queries, support, solved(kernel))
    truth = torch.arange(WAYS)[:, None]
    return (logits.argmax(-1) == truth).float().mean().item()


def solved(kernel: Tensor, steps: int = 200) -> Tensor:
    """A with v* = A' Phi at the minimum of g, for one support image per class.

    Gradient descent with momentum on v, written in A: the gradient is
    ((P - I) / WAYS + DECAY A)' Phi with P the softmax of K A, K = Phi Phi'. The rates are Polyak's
    for curvature between DECAY and trace(K) / (2 WAYS) + DECAY.
    """
    largest = kernel.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] / (2 * WAYS) + DECAY
    low, high = math.sqrt(DECAY), largest.sqrt()
    rate, momentum = 4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2
    values = before = torch.zeros_like(kernel)
    for _ in range(steps):
        gradient = ((kernel @ values).softmax(-1) - torch.eye(WAYS)) / WAYS + DECAY * values
        values, before = values - rate * gradient + momentum * (values - before), values
    return values


def prototypes(task: Task, rates: Rates) -> Solver:
    """Not bilevel: logits are phi's products with the support set's phi, trained by Adam."""
    adam = torch.optim.Adam(task.upper, lr=rates.upper)

    def step() -> None:
        task.begin()
        support = task.features(task.support).view(TASKS, WAYS, -1)
        # A head of one gradient step from 0 has this direction; the length is the tuned rate.
        loss = task._cross_entropy(task.features(task.query), rates.lower * support)
        adam.zero_grad()
        loss.backward()
        adam.step()

    return Solver(step, (adam,))


def baselines(problem: Problem) -> Line:
    """Rows that learn no representation; one image per class is its own mean."""
    rows = {}
    pixels = problem.test.flatten(2)
    task = Task(problem)

    def nearest() -> float:
        support, queries = pixels[problem.tasks][:, :, 0], pixels[problem.tasks][:, :, 1:]
        distances = torch.cdist(queries.flatten(1, 2), support)
        truth = class_by_class(WAYS, QUERIES)
        return (distances.argmin(-1) == truth).float().mean().item()

    for name, found in {
        "nearest image, pixels": nearest,
        "head on pixels": lambda: accuracy(SCALE * normalize(pixels, dim=2), problem.tasks),
        "head on untrained features": lambda: look(copy.copy(task))["accuracy"],
    }.items():
        began = time.process_time()
        rows[name] = {"accuracy": found(), "seconds": time.process_time() - began}
    return rows


def omniglot_race(folder: Path | None) -> RaceProblem:
    """The race on Omniglot."""
    data = load(folder or default_folder("omniglot"))
    simple = Method(prototypes, "simple", (1,), (0.3, 1.0))

    def make(condition: Line) -> Problem:
        return make_problem(data, condition["seed"], condition.get("tuning", False))

    return RaceProblem(
        conditions={"Omniglot, 5-way 1-shot": {"problem": "omniglot"}},
        tuning={"problem": "omniglot", "seed": 100, "tuning": True},
        upper=GRID.upper,
        methods={**methods_of(GRID), "prototypes, not bilevel": simple},
        make=make,
        start=Task,
        look=look,
        baselines=baselines,
        scores={"accuracy": "test accuracy"},
        targets=(("accuracy", 0.95), ("accuracy", 0.995)),
        ended={},
        picture=Picture("test accuracy, fresh heads", 0.5, {}),
        growth=1.25,
    )
