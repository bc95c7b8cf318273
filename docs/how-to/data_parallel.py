"""Two levels on several processes: run by torchrun, see several-gpus.md."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torch_penalty_bilevel import PenaltyBilevelOptimizer

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

torch.manual_seed(0)  # all ranks start alike, and draw the same data and batches
x = torch.randn(240, 16, device=device)
y = x[:, :4].argmax(1)
wrong = torch.rand(200, device=device) < 0.4
given = torch.where(wrong, (y[:200] + 1) % 4, y[:200])

model = DistributedDataParallel(
    nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(device)
)
u = torch.zeros(200, device=device, requires_grad=True)
optimizer = PenaltyBilevelOptimizer(
    [u], model.parameters(), upper_lr=0.1, lower_lr=0.02, reduce="mean"
)

clean = slice(200 + rank, 240, world)
for _ in range(100):
    mine = torch.randperm(200)[:100][rank::world]  # this rank's part of the batch: equal sizes
    optimizer.step(
        lambda: cross_entropy(model(x[clean]), y[clean]),
        lambda: (
            u[mine].sigmoid() * cross_entropy(model(x[mine]), given[mine], reduction="none")
        ).mean(),
    )

told = ((u < 0) == wrong).float().mean()
if rank == 0:
    certificate = float(optimizer.metrics.adjoint_residual_norm)
    print(f"rank 0 of {world}: {told:.0%} of the labels told right, certificate {certificate:.6f}")
dist.destroy_process_group()
