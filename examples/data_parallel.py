"""Find wrong labels on several processes: each sees its part of every batch, u is one for all.

    torchrun --standalone --nproc-per-node 2 -m examples.data_parallel
    python -m examples.data_parallel

The upper variables are a weight per training image, the lower ones a network in
``DistributedDataParallel``, as in ``examples.denoise``. What makes it data-parallel is
``reduce="mean"`` and that each rank takes its share of the batch. Afterwards rank 0 takes the same
steps alone, on whole batches: weights and network are those of the processes, to rounding.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

from examples.denoise.problem import Problem, load, make_model, make_problem
from examples.shared import command
from torch_penalty_bilevel import PenaltyBilevelOptimizer

CLEAN = 40


def learned(
    problem: Problem, steps: int, batch: int, rank: int = 0, world: int = 1
) -> list[Tensor]:
    """The weight of each image and the network, after ``steps`` on this rank's shares."""
    net: nn.Module = make_model(problem, problem.seed)
    options: dict[str, Any] = {}
    if world > 1:
        net, options = DistributedDataParallel(net), {"reduce": "mean"}
    scores = torch.zeros(len(problem.labels), requires_grad=True)
    optimizer = PenaltyBilevelOptimizer(
        [scores], net.parameters(), upper_lr=0.05, lower_lr=1e-2, **options
    )
    source = torch.Generator().manual_seed(problem.seed)  # the same batches on every rank
    for _ in trange(steps, desc=f"{world} processes", disable=rank > 0, leave=False):
        whole = torch.randperm(len(problem.labels), generator=source)[:batch]
        rows = whole[rank::world]  # of equal size, so that the mean of means is the mean
        clean = slice(rank, None, world)

        def upper_loss(clean: slice = clean) -> Tensor:
            return cross_entropy(net(problem.clean_images[clean]), problem.clean_labels[clean])

        def lower_loss(rows: Tensor = rows) -> Tensor:
            losses = cross_entropy(
                net(problem.images[rows]), problem.labels[rows], reduction="none"
            )
            return (scores[rows].sigmoid() * losses).mean()

        optimizer.step(upper_loss, lower_loss)
    return [scores.sigmoid().detach(), *(p.detach() for p in net.parameters())]


def main() -> None:
    """Learn together, then alone, and compare."""
    parser = command.parser(__spec__, __doc__)
    parser.add_argument("--steps", type=command.count, default=100, help="upper steps (100)")
    parser.add_argument(
        "--batch", type=command.count, default=96, help="images of all ranks together (96)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the network (0)")
    options = parser.parse_args()
    rank, world = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    digits, seed = load("digits", None), options.seed
    problem = make_problem(
        digits, seed, model="tanh", train=1000, clean=CLEAN, noise=0.5, flip="uniform"
    )
    if options.batch % world or CLEAN % world:
        parser.error(
            f"--batch {options.batch} and {CLEAN} clean images must be shared by {world} ranks"
        )
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    began = time.perf_counter()
    together = learned(problem, options.steps, options.batch, rank, world)
    seconds = time.perf_counter() - began
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    alone = learned(problem, options.steps, options.batch)
    gaps = [float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)]
    right = ((together[0] > 0.5) == problem.is_right).float().mean()
    print(f"{world} processes: {right:.3f} of the labels told right, {seconds:.1f} s")
    print(f"from one process: weights differ by {gaps[0]:.1e}, the network by {max(gaps[1:]):.1e}")
    print(command.machine())


if __name__ == "__main__":
    main()
