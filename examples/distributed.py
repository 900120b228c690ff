"""CREST in data-parallel training: two processes, DistributedDataParallel, a few lines more than without.

    torchrun --nproc_per_node 2 examples/distributed.py

Each process gets batches from its own shard of the passes; all begin regions, check and set examples aside together.
The lines that CREST adds are marked.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from torchcrest import Crest, CrestConfig  # CREST

STEPS, BATCH = 100, 32  # the batch is one process's


def points(count: int, seed: int) -> TensorDataset:
    """Points around ten centres in 20 dimensions, in two classes: centres of even and of odd number."""
    centres = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(10, (count,), generator=generator)
    return TensorDataset(centres[which] + torch.randn(count, 20, generator=generator), which % 2)


def main() -> None:
    """Train, and print what rank 0 sees of it."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train, test = points(5000, seed=1), points(1000, seed=2)

    config = CrestConfig(batch_size=BATCH)  # CREST
    crest = Crest(model, train, config, steps=STEPS, seed=0)  # CREST: the same seed on all ranks
    for (x, y), weights in crest:  # CREST: instead of a DataLoader with a DistributedSampler
        losses = F.cross_entropy(model(x), y, reduction="none")
        (losses * weights).mean().backward()  # CREST: weighted
        optimizer.step()
        optimizer.zero_grad()

    x, y = (column.to(device) for column in test.tensors)
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).float().mean())
    if dist.get_rank() == 0:
        stats = crest.stats
        print(f"{dist.get_world_size()} processes, {STEPS} steps, {stats.regions} regions, {stats.checks} checks")
        print(f"test accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
