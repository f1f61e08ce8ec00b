"""Statistics where numbers are hard: far from zero, constant, uncountably many; and all ways to average them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import BatchMoments, SyncBatchNorm
from syncbn.kernels.aten import local_moments
from tests.ranks import run_ranks

SHAPE = (6, 4, 24, 24)


def _values(seed: int, mean: float, dtype: torch.dtype, channels_last: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) + mean).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def _statistics(mean: float, dtype: torch.dtype, num_copies: int) -> list[list[Tensor]]:
    """By memory format: running mean, running variance and output; ``num_copies`` make the batch larger."""
    results = []
    for channels_last in (False, True):
        x = _values(dist.get_rank(), mean, dtype, channels_last).repeat(num_copies, 1, 1, 1)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        layer = SyncBatchNorm(SHAPE[1], momentum=1.0)
        layer.running_mean, layer.running_var = (torch.zeros(4).double(), torch.ones(4).double())
        y = layer(x)
        results.append([layer.running_mean, layer.running_var, y])
    return results


@pytest.mark.parametrize("num_copies", [1, 8], ids=["small", "large"])
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [(torch.float32, 1e4), (torch.float64, 1e4), (torch.float16, 500.0), (torch.bfloat16, 60.0)],
    ids=["float32", "float64", "float16", "bfloat16"],
)
def test_a_far_mean_keeps_its_variance_to_1e_5_in_every_format(
    dtype: torch.dtype, mean: float, num_copies: int
) -> None:
    x = torch.cat([_values(rank, mean, dtype, False) for rank in range(2)]).double()
    var, expected = torch.var_mean(x, (0, 2, 3), correction=0)
    count = x.numel() // 4 * num_copies
    for formats in run_ranks(2, _statistics, mean, dtype, num_copies):
        for running_mean, running_var, y in formats:
            torch.testing.assert_close(running_mean, expected, rtol=1e-9, atol=0)
            torch.testing.assert_close(running_var, var * (count / (count - 1)), rtol=1e-5, atol=0)
            assert y.isfinite().all()


@pytest.mark.parametrize("value", [1e4 / 3, -7e6 / 3, 1e-30, 3e15], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 80, 80)], ids=["small", "large"])
def test_a_constant_channel_has_no_negative_and_hardly_any_variance(shape: tuple[int, ...], value: float) -> None:
    for running_var, finite in run_ranks(2, _train_on_constant, shape, value):
        assert finite
        assert (running_var >= 0).all()
        # What the packed sum of squares rounds away, relative to the square of the mean.
        assert (running_var <= 1e-14 * value**2).all()


def _train_on_constant(shape: tuple[int, ...], value: float) -> tuple[Tensor, bool]:
    layer = SyncBatchNorm(3, momentum=1.0)
    layer.running_mean, layer.running_var = torch.zeros(3).double(), torch.ones(3).double()
    x = torch.full(shape, value).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(shape))
    assert x.grad is not None
    return layer.running_var, bool(y.isfinite().all() and x.grad.isfinite().all())


def test_more_values_than_an_int32_counts_are_merged_exactly() -> None:
    many = BatchMoments(*(torch.tensor(value, dtype=torch.float64) for value in (2.0**40, [1.0], [4.0])))
    one = BatchMoments(*(torch.tensor(value, dtype=torch.float64) for value in (1.0, [3.0], [0.0])))
    for merged in (many.merge(one), BatchMoments.unpack(many.pack() + one.pack())):
        assert merged.count == 2**40 + 1
        expected = 1 + 2 / (2**40 + 1)
        torch.testing.assert_close(merged.mean, torch.tensor([expected], dtype=torch.float64), rtol=1e-15, atol=0)
        assert merged.unbiased_var.item() == pytest.approx(4.0, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_batch_whose_parts_differ_much_is_not_misjudged_by_its_sample(dtype: torch.dtype) -> None:
    # The rough mean comes from a share of the rows; here that share is unlike the rest.
    x = torch.randn(32, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    x[0] += 100
    for channels_last in (False, True):
        values = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        moments = local_moments(values)
        var, mean = torch.var_mean(values.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.var, var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0], ids=str)
def test_every_momentum_averages_as_torch_does(momentum: float | None) -> None:
    layer = nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    for step in range(3):
        layer(_step_values(step))
    for buffers in run_ranks(3, _train_steps, momentum):
        for actual, expected in zip(buffers, layer.buffers(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def _step_values(step: int) -> Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (step + 1)


def _train_steps(momentum: float | None) -> list[Tensor]:
    layer = SyncBatchNorm(4, momentum=momentum, dtype=torch.float64)
    for step in range(3):
        layer(_step_values(step)[dist.get_rank() :: 3])
    return list(layer.buffers())


def test_half_parameters_train_beside_statistics_in_float32() -> None:
    for running_var, grad_dtype, exact in run_ranks(2, _train_half_parameters):
        torch.testing.assert_close(running_var, exact, rtol=1e-5, atol=0)
        assert grad_dtype == torch.bfloat16


def _train_half_parameters() -> tuple[Tensor, torch.dtype, Tensor]:
    layer = SyncBatchNorm(4, momentum=1.0, dtype=torch.bfloat16)
    layer.running_mean, layer.running_var = torch.zeros(4), torch.ones(4)
    joined = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer(joined[dist.get_rank() :: 2]).sum().backward()
    assert layer.weight.grad is not None
    return layer.running_var, layer.weight.grad.dtype, joined.float().var((0, 2))
