"""Any split of any batch over ranks, in any memory format, is one process with all values."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from syncbn import SyncBatchNorm
from tests.ranks import run_ranks
from tests.syncbn.collectives import CollectiveLog

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Relative and absolute, for values of order 1 with a rounding or two; gradients of few values have large factors."""


@dataclass(frozen=True)
class Split:
    """What each rank holds: shapes of equally many dimensions and channels, and whether its channels come last."""

    shapes: tuple[tuple[int, ...], ...]
    channels_last: tuple[bool, ...]
    dtype: torch.dtype
    half_parameters: bool

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) // self.shapes[0][1]

    def values(self, rank: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 100 + rank)
        shape = self.shapes[rank]
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1).to(self.dtype)
        is_last = self.channels_last[rank] and len(shape) in LAST
        return values.contiguous(memory_format=LAST[len(shape)] if is_last else torch.contiguous_format)


@st.composite
def splits(draw: st.DrawFn, world_size: int) -> Split:
    num_dims, num_channels = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    sizes = st.tuples(st.integers(0, 4), *[st.integers(0, 3)] * num_dims)
    return Split(
        tuple((n, num_channels, *rest) for n, *rest in draw(st.tuples(*[sizes] * world_size))),
        draw(st.tuples(*[st.booleans()] * world_size)),
        draw(st.sampled_from(list(TOLERANCE))),
        world_size > 1 and draw(st.booleans()),  # alone it is torch's layer, which wants buffers like parameters
    )


@dataclass(frozen=True)
class Outcome:
    """What a rank has after one step; a message instead if it raised."""

    error: str | None
    output: Tensor | None
    grad: Tensor | None
    buffers: list[Tensor]
    collectives: list[int]


def _step(split: Split) -> Outcome:
    rank = dist.get_rank()
    dtype = split.dtype if split.half_parameters else torch.promote_types(split.dtype, torch.float32)
    layer = SyncBatchNorm(split.shapes[0][1], dtype=dtype)
    if dtype != torch.float64:  # buffers of float32 beside half parameters
        layer.running_mean, layer.running_var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
    x = split.values(rank, 1).requires_grad_()
    with CollectiveLog() as log:
        try:
            y = layer(x)
        except ValueError as error:
            return Outcome(str(error).partition(" (")[0], None, None, list(layer.buffers()), [])
        y.backward(split.values(rank, 2))
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == x.dtype
    if x.dim() in LAST and x.is_contiguous(memory_format=LAST[x.dim()]) and x.numel() > 0:
        assert y.is_contiguous(memory_format=LAST[x.dim()])
        assert x.grad.is_contiguous(memory_format=LAST[x.dim()])
    values = [collective.num_values for collective in log.collectives]
    return Outcome(None, y.detach(), x.grad, list(layer.buffers()), values)


def _steps(cases: list[Split]) -> list[Outcome]:
    return [_step(case) for case in cases]


def _rows(values: Tensor) -> Tensor:
    return values.movedim(1, -1).reshape(-1, values.size(1)).double()


def _check(split: Split, ranks: list[Outcome]) -> None:
    for rank in ranks:
        assert all(torch.equal(a, b) for a, b in zip(rank.buffers, ranks[0].buffers, strict=True))
    if split.num_values == 1 and len(ranks) > 1:
        assert {rank.error for rank in ranks} == {
            "expected more than one value per channel over all ranks in training, got one"
        }
    if split.num_values <= 1:
        assert [set(buffer.flatten().tolist()) for buffer in ranks[0].buffers] == [{0.0}, {1.0}, {0}]
        return
    layer = nn.BatchNorm1d(split.shapes[0][1], dtype=torch.float64)
    x = torch.cat([_rows(split.values(rank, 1)) for rank in range(len(ranks))]).requires_grad_()
    y = layer(x)
    y.backward(torch.cat([_rows(split.values(rank, 2)) for rank in range(len(ranks))]))
    assert x.grad is not None
    outputs = torch.cat([_rows(rank.output) for rank in ranks if rank.output is not None])
    grads = torch.cat([_rows(rank.grad) for rank in ranks if rank.grad is not None])
    var = torch.var_mean(x.detach(), 0, correction=0)[0]
    tolerance = TOLERANCE[split.dtype]
    torch.testing.assert_close(outputs, y.detach(), rtol=tolerance, atol=tolerance)
    # A gradient is a difference of terms of the size of dy / std.
    scale = (1 + var.rsqrt()) * 4
    torch.testing.assert_close(grads / scale, x.grad / scale, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(ranks[0].buffers, layer.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    if len(ranks) > 1:
        channels = split.shapes[0][1]
        assert all(rank.collectives == [2 * channels + 1, 2 * channels] for rank in ranks)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_split_in_any_format_is_one_process_with_all_values(world_size: int) -> None:
    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(st.lists(splits(world_size), min_size=12, max_size=12))
    def check(cases: list[Split]) -> None:
        cases = [case for case in cases if world_size > 1 or case.num_values != 1]  # torch's own error
        outcomes = run_ranks(world_size, _steps, cases)
        for place, case in enumerate(cases):
            _check(case, [rank[place] for rank in outcomes])

    check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_one_sample_on_each_rank_is_a_batch(dtype: torch.dtype) -> None:
    for shapes in (((1, 3),) * 4, ((1, 3, 1, 1), (0, 3, 2, 2), (1, 3, 2, 0), (1, 3, 1, 2))):
        split = Split(shapes, (False, True, True, False), dtype, half_parameters=False)
        _check(split, [rank[0] for rank in run_ranks(4, _steps, [split])])
