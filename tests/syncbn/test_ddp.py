"""The layer in DistributedDataParallel: training on ranks is training in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm, convert_sync_batchnorm, rank_disagreement
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


@pytest.mark.parametrize("sizes", [(5,), (6, 6), (7, 2, 3), (4, 0, 1, 5)], ids=["alone", "equal", "unequal", "empty"])
def test_five_steps_on_ranks_are_five_steps_in_one_process(sizes: tuple[int, ...]) -> None:
    expected = _train(_model(), _batches(sum(sizes)), 1 / sum(sizes))
    for state, disagreement in run_ranks(len(sizes), _train_rank, sizes):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert disagreement == {"1": 0.0, "5": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"forward_sync_buffers": False},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True, "forward_sync_buffers": False},
    ],
    ids="-".join,
)
def test_no_option_of_the_wrapper_changes_that(options: dict[str, Any]) -> None:
    expected = _train(Branched(), _batches(9), 1 / 9)
    for state, disagreement in run_ranks(2, _train_branched, options):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert set(disagreement.values()) == {0.0}


class Branched(nn.Module):
    """A layer in use twice a step, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(2, dtype=torch.float64)
        self.linear = nn.Linear(2 * 36, 3, dtype=torch.float64)
        self.idle = nn.BatchNorm2d(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.conv(x)).relu()
        x = x + self.norm(self.conv(x)).relu()
        output: Tensor = self.linear(x.flatten(1))
        return output


def _train_branched(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    rank = dist.get_rank()
    shards = [(torch.split(x, [4, 5])[rank], torch.split(y, [4, 5])[rank]) for x, y in _batches(9)]
    model = convert_sync_batchnorm(Branched())
    if not ({"find_unused_parameters", "static_graph"} & options.keys()):
        model.idle.requires_grad_(False)  # else the wrapper waits for its gradients
    _train(DistributedDataParallel(model, **options), shards, 2 / 9)
    return model.state_dict(), rank_disagreement(model)


def test_a_buffer_that_only_rank_zero_knows_reaches_the_others_by_broadcast() -> None:
    """A checkpoint loaded on rank 0 after wrapping is what all ranks go on with; the layer itself sends no buffers."""
    assert run_ranks(2, _running_mean_after_a_step) == [0.5, 0.5]


def _running_mean_after_a_step() -> float:
    layer = SyncBatchNorm(1, momentum=0.5)
    model = DistributedDataParallel(layer)
    assert layer.running_mean is not None
    layer.running_mean.fill_(1.0 if dist.get_rank() == 0 else 7.0)
    x = torch.tensor([[-1.0], [1.0]])
    model(x)
    return float(layer.running_mean)
