"""The layer in DistributedDataParallel: training on ranks is training in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm, rank_disagreement
from tests.ranks import run_ranks

NUM_STEPS = 5


def _model() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 8, bias=False),
        nn.BatchNorm1d(8, momentum=None),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()


def _batches(size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(12)
    return [
        (
            torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(NUM_STEPS)
    ]


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss_scale: float) -> dict[str, Tensor]:
    """Five steps on summed cross-entropy times ``loss_scale``; the state dict they end with."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum") * loss_scale
        torch.autograd.backward(loss)
        optimizer.step()
    return model.state_dict()


def _train_rank(sizes: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, float]]:
    rank = dist.get_rank()
    shards = [
        (torch.split(x, list(sizes))[rank], torch.split(target, list(sizes))[rank])
        for x, target in _batches(sum(sizes))
    ]
    model = convert_sync_batchnorm(_model())
    # The wrapper averages gradients over ranks: times W, so that it sums them.
    _train(DistributedDataParallel(model), shards, len(sizes) / sum(sizes))
    return model.state_dict(), rank_disagreement(model)


@pytest.mark.parametrize("sizes", [(6, 6), (7, 2, 3)], ids=["equal", "unequal"])
def test_five_steps_on_ranks_are_five_steps_in_one_process(sizes: tuple[int, ...]) -> None:
    expected = _train(_model(), _batches(sum(sizes)), 1 / sum(sizes))
    for state, disagreement in run_ranks(len(sizes), _train_rank, sizes):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert disagreement == {"1": 0.0, "5": 0.0}
