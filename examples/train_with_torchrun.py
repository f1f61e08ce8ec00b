"""Train with the layer alone, without the service: torchrun --standalone --nproc_per_node=2 THIS_FILE.

Each rank holds two random images of another brightness. Synchronized, all ranks normalize by the same numbers;
at the end each rank prints its running mean, and they are equal to the last bit.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm


def main() -> None:
    """Take ten steps on every rank."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
    model = DistributedDataParallel(convert_sync_batchnorm(plain))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(10):
        loss = model(torch.randn(2, 1, 8, 8, generator=images) + dist.get_rank()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {dist.get_rank()}: running mean {model.module[1].running_mean.tolist()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
