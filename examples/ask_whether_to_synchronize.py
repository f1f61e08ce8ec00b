"""Ask whether BatchNorm needs to be synchronized: torchrun --standalone --nproc_per_node=2 THIS_FILE.

Twenty local steps each on random images: 4 and 32 images a rank, then 32 of which one rank's are brighter.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.survey import RankSurvey


def main() -> None:
    """Take the steps on every rank; rank 0 prints the advice, which is the same on all."""
    dist.init_process_group("gloo")
    for num_images, brighter in ((4, 0.0), (32, 0.0), (32, 0.3)):
        advice = take_steps(num_images, brighter * dist.get_rank())
        if dist.get_rank() == 0:
            print(f"{num_images} images a rank, one brighter by {brighter:g}: {advice}\n")
    dist.destroy_process_group()


def take_steps(num_images: int, brightness: float) -> str:
    """Twenty steps of a fully connected network, unsynchronized."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.Generator().manual_seed(dist.get_rank())
    with RankSurvey(model) as survey:
        for _ in range(20):
            loss = model(torch.randn(num_images, 64, generator=images) + brightness).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            survey.step()
        return survey.advice().sentence


if __name__ == "__main__":
    main()
