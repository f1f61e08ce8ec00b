"""Gradient accumulation: statistics over all micro-batches as one batch, and gradients under DDP's no_sync."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, accumulate_statistics
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog

F64 = torch.float64
SIZES = (4, 1, 3)


def _micro_batches() -> list[Tensor]:
    """Joined over ranks: sizes and distributions differ."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2 * n, 4, 3, generator=generator, dtype=F64) * n + n for n in SIZES]


def _own(batch: Tensor) -> Tensor:
    """Three quarters to rank 0, the rest to the last; the smallest batch leaves that with nothing too."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    cut = len(batch) if len(batch) < 4 or last == 0 else 3 * len(batch) // 4
    return batch[:cut] if rank == 0 else batch[cut:] if rank == last else batch[:0]


@pytest.mark.parametrize(("world_size", "momentum"), [(1, None), (2, 0.1), (2, None), (3, 0.1), (4, None)])
def test_micro_batches_are_tracked_as_the_batch_they_make_up(world_size: int, momentum: float | None) -> None:
    layer = nn.BatchNorm1d(4, momentum=momentum, dtype=F64)
    for _ in range(2):
        layer(torch.cat(_micro_batches()))
    for buffers, num_collectives in run_ranks(world_size, _accumulate, momentum):
        assert num_collectives == (2 * len(SIZES) if world_size > 1 else 0)
        for actual, expected in zip(buffers, layer.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def _accumulate(momentum: float | None) -> tuple[list[Tensor], int]:
    layer = SyncBatchNorm(4, momentum=momentum, dtype=F64)
    with CollectiveLog() as log:
        for _ in range(2):
            with accumulate_statistics(layer):
                for batch in _micro_batches():
                    layer(_own(batch))
    return list(layer.buffers()), len(log.collectives)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_recomputation_is_not_collected(use_reentrant: bool) -> None:
    layer, expected = SyncBatchNorm(4, dtype=F64), nn.BatchNorm1d(4, dtype=F64)
    expected(torch.cat(_micro_batches()))
    with accumulate_statistics(nn.Sequential(layer)):
        for batch in _micro_batches():
            y = checkpoint(layer, batch.requires_grad_(), use_reentrant=use_reentrant)
            torch.autograd.backward(y.square().sum())
    for actual, wanted in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_a_block_that_raises_or_runs_nothing_leaves_the_statistics() -> None:
    layer = SyncBatchNorm(4)
    with accumulate_statistics(layer):
        pass
    with pytest.raises(RuntimeError, match="no more data"):
        _run_out_of_data(layer)
    assert [set(buffer.flatten().tolist()) for buffer in layer.buffers()] == [{0.0}, {1.0}, {0}]
    layer(torch.randn(5, 4))
    assert layer.num_batches_tracked == 1


def _run_out_of_data(layer: nn.Module) -> None:
    with accumulate_statistics(layer):
        layer(torch.randn(5, 4))
        raise RuntimeError("no more data")


def test_gradients_accumulate_without_ddp_and_are_those_of_one_process() -> None:
    model = _model(nn.BatchNorm1d(4))
    for batch in _micro_batches():
        torch.autograd.backward(model(batch.flatten(1)).square().sum() / 2)  # the wrapper averages over two ranks
    for grads in run_ranks(2, _accumulate_gradients):
        for actual, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-9, atol=1e-9)


def _model(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 4), norm, nn.Tanh()).double()


def _accumulate_gradients() -> list[Tensor | None]:
    model = DistributedDataParallel(_model(SyncBatchNorm(4)))
    batches = _micro_batches()
    for place, batch in enumerate(batches):
        with nullcontext() if place == len(batches) - 1 else model.no_sync():
            torch.autograd.backward(model(_own(batch).flatten(1)).square().sum())
    return [parameter.grad for parameter in model.parameters()]
