"""The rank's own kernels against torch's BatchNorm in float64, over layouts, types and distances from zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn import sync_batch_norm
from syncbn.kernels.aten import deviation_moments, local_moments

SHAPES = [(2, 3), (300, 250), (4, 3, 5), (3, 16, 40, 50), (1, 4, 200, 200), (2, 5, 3, 4, 6)]


def _values(shape: tuple[int, ...], mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + mean


def _check_moments(x: Tensor, rtol: float, atol: float) -> None:
    moments = local_moments(x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    assert moments.count == x.numel() // x.size(1)
    assert moments.mean.dtype == moments.var.dtype == torch.float64
    torch.testing.assert_close(moments.mean, mean, rtol=rtol, atol=atol)
    torch.testing.assert_close(moments.var, var, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_of_every_type_and_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    _check_moments(_values(shape, mean=1.0).to(dtype), tolerance, tolerance)


@pytest.mark.parametrize("size", [8, 64], ids=["small", "large"])
def test_moments_of_channels_last_and_of_strided_inputs(size: int) -> None:
    x = _values((6, 8, size, size)).float()
    _check_moments(x.contiguous(memory_format=torch.channels_last), 1e-5, 1e-6)
    _check_moments(x[:, ::2, ::3], 1e-5, 1e-6)
    _check_moments(x.transpose(2, 3), 1e-5, 1e-6)


@pytest.mark.parametrize(("mean", "tolerance"), [(1e2, 1e-6), (1e4, 1e-5), (1e6, 1e-5)])
def test_moments_of_contiguous_float32_far_from_zero(mean: float, tolerance: float) -> None:
    x = _values((8, 4, 64, 64), mean).float()
    _check_moments(x, tolerance, 0.0)
    _check_moments(x[0, :, :, :1], tolerance, 0.0)


FAR = {torch.float32: 1e4, torch.float16: 500.0, torch.bfloat16: 60.0}


def _check_far_moments(x: Tensor, mean: Tensor, var: Tensor) -> None:
    dims = [dim for dim in range(x.dim()) if dim != 1]
    expected_var, expected_mean = torch.var_mean(x.double(), dims, correction=0)
    assert mean.dtype == var.dtype == torch.float64
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 512, 512), (1, 2, 90, 90, 60), (300_000, 4)], ids=str)
def test_moments_of_long_rows_and_columns_far_from_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _values(shape, FAR[dtype]).to(dtype)
    moments = local_moments(x)
    _check_far_moments(x, moments.mean, moments.var)


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("block_size", [1 << 24, 1 << 14], ids=["one-block", "many-blocks"])
def test_what_other_devices_than_the_cpu_run_is_as_exact(block_size: int, dtype: torch.dtype) -> None:
    for shape in ((100_000, 4), (30, 8, 50, 50), (7, 3, 20, 30, 10)):
        x = _values(shape, FAR[dtype]).to(dtype)
        formats = [x, x.transpose(1, -1).contiguous().transpose(1, -1), x.repeat_interleave(2, 0)[::2]]
        for values in formats:
            _check_far_moments(values, *deviation_moments(values, block_size))


def test_no_values_have_moments_of_nothing() -> None:
    moments = local_moments(torch.empty(0, 3, 4))
    assert torch.cat([moments.mean, moments.var, moments.count.view(1)]).tolist() == [0.0] * 7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_group_the_function_is_torchs_in_float64(shape: tuple[int, ...]) -> None:
    _check_function(_values(shape, 2.0), _values(shape))


def test_input_and_gradient_may_differ_in_memory_format() -> None:
    x, dy = _values((5, 6, 7, 8), 2.0), _values((5, 6, 7, 8))
    channels_last = torch.channels_last
    _check_function(x.contiguous(memory_format=channels_last), dy)
    _check_function(x, dy.contiguous(memory_format=channels_last))
    _check_function(x, dy[:, :, :1, :1].expand_as(dy))


def _check_function(x: Tensor, dy: Tensor) -> None:
    """Output and all gradients to 1e-10."""
    ours, theirs = _leaves(x), _leaves(x)
    outputs = [
        sync_batch_norm(ours[0], weight=ours[1], bias=ours[2], eps=1e-3),
        F.batch_norm(theirs[0], None, None, theirs[1], theirs[2], training=True, eps=1e-3),
    ]
    for output in outputs:
        torch.autograd.backward(output, dy)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-10, atol=1e-10)


def _leaves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.linspace(0.5, 2.0, x.size(1), dtype=x.dtype)
    return x.detach().requires_grad_(), weight.requires_grad_(), weight.detach().neg().requires_grad_()


def test_the_input_gradient_is_that_of_finite_differences() -> None:
    leaves = _leaves(_values((3, 2, 2)))
    assert torch.autograd.gradcheck(lambda x, w, b: sync_batch_norm(x, None, None, w, b), leaves)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_what_is_not_one_value_a_channel_is_refused(name: str) -> None:
    arguments: dict[str, Tensor] = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    for size in (1, 3, 5):
        with pytest.raises(ValueError, match=rf"expected one value per channel.*got shape \({size},\)"):
            sync_batch_norm(torch.randn(6, 4), **(arguments | {name: torch.ones(size)}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two or more dimensions"):
        sync_batch_norm(torch.randn(6))


def test_a_momentum_of_none_needs_a_counter() -> None:
    with pytest.raises(ValueError, match="num_batches_tracked"):
        sync_batch_norm(_values((4, 3)), torch.zeros(3), torch.ones(3), momentum=None)
