"""CUDA graphs of the layer over NCCL, with a rank that has no rows: captured once, replayed with new values."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none here"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="needs NCCL, which this torch was built without"),
]


def _join_nccl() -> dist.ProcessGroup:
    """A group of all ranks over NCCL, one GPU each, beside gloo's."""
    torch.cuda.set_device(dist.get_rank())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=60))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _captured_step(layer: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """Forward and backward of ``layer(x)`` as a graph, with its output and gradient; warmed up before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x).pow(3).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
    return graph, y, grad


def _replay(sizes: tuple[int, ...], rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    layer = SyncBatchNorm(4, momentum=None, process_group=group, device="cuda")
    x = torch.zeros(sizes[rank], 4, 5, device="cuda", requires_grad=True)
    graph, y, grad = _captured_step(layer, x)
    layer.reset_running_stats()
    joined = torch.randn(sum(sizes), 4, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x.copy_(torch.split(joined, list(sizes))[rank])
    graph.replay()
    torch.cuda.synchronize()
    assert layer.running_var is not None
    return y.detach().cpu(), grad.cpu(), layer.running_var.cpu()


def _replay_over_nccl(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return _replay(sizes, dist.get_rank(), _join_nccl())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL refuses two ranks on one")
def test_a_captured_step_replays_with_an_empty_rank() -> None:
    _check(run_ranks(2, _replay_over_nccl, (6, 0)), 6)


def test_a_captured_step_of_a_process_alone_replays_with_its_mean_over_all_batches() -> None:
    _check([_replay((6,), 0, None)], 6)


def _check(ranks: list[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> None:
    layer = nn.BatchNorm1d(4, momentum=None, dtype=torch.float64)
    x = torch.randn(num_rows, 4, 5, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
    for place, expected in ((0, y.detach()), (1, grad)):
        actual = torch.cat([rank[place] for rank in ranks]).double()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for rank in ranks:
        torch.testing.assert_close(rank[2].double(), layer.running_var, rtol=1e-5, atol=1e-6)


def test_a_captured_empty_batch_of_a_process_alone_leaves_the_statistics() -> None:
    layer = SyncBatchNorm(4, device="cuda")
    x = torch.zeros(0, 4, 5, device="cuda", requires_grad=True)
    graph, _, grad = _captured_step(layer, x)
    graph.replay()
    torch.cuda.synchronize()
    assert grad.shape == x.shape
    assert layer.running_mean is not None
    assert torch.equal(layer.running_mean.cpu(), torch.zeros(4))
