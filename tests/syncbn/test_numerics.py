"""Statistics where numbers are hard: far from zero, constant, uncountably many, of mixed types; and all averages."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import BatchMoments, SyncBatchNorm
from syncbn.kernels.aten import local_moments
from tests.ranks import run_ranks

SHAPE = (6, 4, 24, 24)
HALVES = (torch.float16, torch.bfloat16)
FAR = {torch.float32: 1e4, torch.float64: 1e4, torch.float16: 500.0, torch.bfloat16: 60.0}
"""Means in standard deviations; half-precision types hold no variance beside a larger one."""


def _in_all_formats(values: Tensor) -> dict[str, Tensor]:
    """``(N, C, H, W)`` in all numbers of dimensions and memory formats, by name."""
    volume = values.view(*values.shape[:2], 6, -1, values.size(3))
    return {
        "2d": values.movedim(1, -1).reshape(-1, values.size(1)),
        "3d": values.flatten(2),
        "4d": values,
        "4d, channels last": values.contiguous(memory_format=torch.channels_last),
        "5d": volume,
        "5d, channels last": volume.contiguous(memory_format=torch.channels_last_3d),
        "with gaps": values.repeat_interleave(2, 3)[..., ::2],
    }


def _values(rank: int, dtype: torch.dtype, num_copies: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(SHAPE, generator=generator, dtype=torch.float64) + FAR[dtype]
    return values.to(dtype).repeat(num_copies, 1, 1, 1)


def _statistics(dtype: torch.dtype, num_copies: int) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """By format: running mean, running variance, and whether the output is finite."""
    results = {}
    for name, x in _in_all_formats(_values(dist.get_rank(), dtype, num_copies)).items():
        layer = SyncBatchNorm(SHAPE[1], momentum=1.0, dtype=torch.promote_types(dtype, torch.float32))
        y = layer(x)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        results[name] = (layer.running_mean, layer.running_var, bool(y.isfinite().all()))
    return results


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_far_mean_keeps_its_variance_to_1e_5_in_every_format(world_size: int, dtype: torch.dtype) -> None:
    num_copies = 8 // world_size  # beyond what is simply widened, on a rank with all of it
    joined = torch.cat([_values(rank, dtype, num_copies) for rank in range(world_size)]).double()
    expected_var, expected_mean = torch.var_mean(joined, (0, 2, 3))
    for formats in run_ranks(world_size, _statistics, dtype, num_copies):
        for name, (mean, var, finite) in formats.items():
            assert finite, name
            assert ((mean / expected_mean - 1).abs() <= 1e-7).all(), name
            assert ((var / expected_var - 1).abs() <= 1e-5).all(), name


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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("deviations", [0.0, 1.9, 2.1, 30.0])
def test_means_near_and_far_are_as_good(dtype: torch.dtype, deviations: float) -> None:
    # Near ones come from torch's operator, by blocks; the last block is smaller than the others.
    x = torch.randn(7, 5, 60, 61, generator=torch.Generator().manual_seed(0)) + deviations
    for channels_last in (False, True):
        values = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        moments = local_moments(values)
        var, mean = torch.var_mean(values.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(moments.mean, mean, rtol=0, atol=1e-5)
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


@dataclass(frozen=True)
class Types:
    """Of a layer's input, parameters and buffers; torch's layer takes none of `MIXED`."""

    input: torch.dtype
    parameters: torch.dtype
    buffers: torch.dtype


MIXED = [
    *(Types(half, half, torch.float32) for half in HALVES),
    *(Types(torch.float32, half, torch.float32) for half in HALVES),
    Types(torch.bfloat16, torch.float16, torch.float64),
    Types(torch.float64, torch.float32, torch.float32),
    Types(torch.float32, torch.float64, torch.float64),
]


@pytest.mark.parametrize("world_size", [1, 3])
def test_types_may_mix_in_training_and_evaluation_and_statistics_stay_in_theirs(world_size: int) -> None:
    ranks = run_ranks(world_size, _train_and_evaluate_mixed)
    for place, types in enumerate(MIXED):
        expected = _train_and_evaluate(nn.BatchNorm1d(4, dtype=torch.float64), _mixed_values(types).double())
        tolerance = 8 * max(torch.finfo(types.input).eps, torch.finfo(types.parameters).eps)
        for output in ("trained", "evaluated"):
            joined = torch.cat([rank[place][output] for rank in ranks])
            torch.testing.assert_close(joined.double(), expected[output], rtol=tolerance, atol=tolerance)
        for rank in ranks:
            torch.testing.assert_close(rank[place]["var"].double(), expected["var"], rtol=1e-5, atol=0)
            assert rank[place]["var"].dtype == types.buffers
            assert rank[place]["trained"].dtype == rank[place]["evaluated"].dtype == types.input
            assert rank[place]["weight_grad"].dtype == types.parameters


def _mixed_values(types: Types) -> Tensor:
    return torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)).to(types.input)


def _train_and_evaluate_mixed() -> list[dict[str, Tensor]]:
    results = []
    for types in MIXED:
        layer = SyncBatchNorm(4, dtype=types.parameters)
        layer.running_mean, layer.running_var = (
            torch.zeros(4, dtype=types.buffers),
            torch.ones(4, dtype=types.buffers),
        )
        results.append(_train_and_evaluate(layer, _mixed_values(types).chunk(dist.get_world_size())[dist.get_rank()]))
    return results


def _train_and_evaluate(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    trained = layer(x)
    trained.sum().backward()
    evaluated = layer.eval()(x)
    weight_grad = layer.get_parameter("weight").grad
    assert weight_grad is not None
    outputs = {"trained": trained.detach(), "evaluated": evaluated.detach()}
    return outputs | {"var": layer.get_buffer("running_var"), "weight_grad": weight_grad}
