"""Watch the BatchNorm layers of a training script: torchrun --standalone --nproc_per_node=3 THIS_FILE.

All ranks draw random images, but those of rank 2 are brighter, which no curve of the loss shows. Every tenth step is
sampled, and from the fifth sample on it is known which rank differs, in which layer and by how much.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm
from syncbn.monitor import BatchNormMonitor


def main() -> None:
    """Take a hundred steps on every rank; rank 0 tells what all of them know."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))
    model = DistributedDataParallel(convert_sync_batchnorm(plain))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.Generator().manual_seed(dist.get_rank())
    with BatchNormMonitor(model, every=10) as monitor:
        for _ in range(100):
            brightness = 0.3 * (dist.get_rank() == 2)
            loss = model(torch.randn(8, 1, 8, 8, generator=images) + brightness).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sample = monitor.step()  # None between samples; the same on every rank
            if sample is not None and dist.get_rank() == 0:
                print(f"step {sample.step}:", *[str(finding) for finding in sample.ranks if finding.fires])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
