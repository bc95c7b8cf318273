"""A lower level that FSDP2 shards: run by torchrun, see several-gpus.md."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from torch_penalty_bilevel import PenaltyBilevelOptimizer

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

torch.manual_seed(0)  # all ranks start alike, and draw the same data
x = torch.randn(240, 16, device=device)
y = x[:, :4].argmax(1)
wrong = torch.rand(200, device=device) < 0.4
given = torch.where(wrong, (y[:200] + 1) % 4, y[:200])

model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(device)
mesh = init_device_mesh(device.type, (world,))
for layer in model[0], model[2], model:
    fully_shard(layer, mesh=mesh)
u = torch.zeros(200, device=device, requires_grad=True)  # not sharded
optimizer = PenaltyBilevelOptimizer(
    [u], model.parameters(), upper_lr=0.1, lower_lr=0.02, reduce="mean"
)

mine = slice(rank, 200, world)  # parts of equal size
clean = slice(200 + rank, 240, world)
for _ in range(60):
    optimizer.step(
        lambda: cross_entropy(model(x[clean]), y[clean]),
        lambda: (
            u[mine].sigmoid() * cross_entropy(model(x[mine]), given[mine], reduction="none")
        ).mean(),
    )

told = ((u < 0) == wrong).float().mean()
if rank == 0:
    held = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"rank 0 holds {held} of {whole} parameters; {told:.0%} of the labels told right")
dist.destroy_process_group()
