"""The rank's own share of batch normalization in torch operators: any device, any memory format, no host wait.

Shapes: ``input`` and ``grad_output`` are ``(N, C, *)``, everything per channel ``(C,)``.
"""

import torch
from torch import Tensor

from syncbn.moments import BatchMoments

_SMALL = 1 << 16  # values; below it, doubling a tensor's width costs less than a look at its layout
_BLOCK = 1 << 18  # values; a megabyte of float32 stays in cache between two passes
_FLOAT32_SUM = 1 << 12  # values of a channel that are summed in float32
_NEAR = 2.0  # standard deviations
_DEVICE_BLOCK = 1 << 24  # values; 64 MiB of float32, enough to keep a device busy


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The type of per-channel values beside ``input``: its own, but never below float32."""
    return torch.promote_types(input.dtype, torch.float32)


def local_moments(input: Tensor, mask: Tensor | None = None) -> BatchMoments:
    """Moments of the rank's own values, or of those where ``mask`` is True; those of none where there are none.

    Shape: ``mask`` is boolean, 1-d to ``input``'s dimensions less the channels, ``(N, *)`` or less of it.
    Accuracy: the variance is good to 1e-5 at a mean of 1e4 standard deviations, on every device, in every type and
        memory format that can hold such values. Torch's own operator is not, for it sums in float32.
    Cost: on a CPU about one pass over ``input``, and up to two more where a mean is beyond two standard deviations;
        elsewhere see `deviation_moments`. With a mask two more.
    """
    if input.numel() == 0:
        return BatchMoments.empty(input.size(1), input.device)
    if mask is not None:
        return _masked_moments(input, mask)
    count = torch.full((), input.numel() // input.size(1), dtype=torch.float64, device=input.device)
    mean, var = _mean_and_var(input)
    return BatchMoments(count, mean.double(), var.double())


def deviation_moments(input: Tensor, block_size: int = _DEVICE_BLOCK) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``(C,)`` in float64, on any device and in any memory format, by plain reductions.

    They are those of deviations from a rough mean: off by a thousandth of a standard deviation, it leaves numbers that
    float32 sums in pairs without loss.
    Cost: one pass for the rough mean and four over deviations, where torch's operator has one in all. In memory
        ``block_size`` float32 values at a time, or one sample if that is more. Nothing waits for the device.
    """
    dims = [dim for dim in range(input.dim()) if dim != 1]
    count = input.numel() // input.size(1)
    rough_mean = input.mean(dims, dtype=torch.float32)
    squares = torch.zeros_like(rough_mean, dtype=torch.float64)
    remainder = torch.zeros_like(squares)
    for block in torch.split(input, max(1, block_size // input[0].numel())):
        deviation = block - rough_mean.view(-1, *[1] * (input.dim() - 2))
        remainder += deviation.sum(dims)
        squares += deviation.square_().sum(dims)
    return _corrected(rough_mean, remainder / count, squares / count)


def over_positions(mask: Tensor, input: Tensor) -> Tensor:
    """``mask`` with a dimension for channels and as many as ``input``, so that it broadcasts against it."""
    return mask.view(mask.size(0), 1, *mask.shape[1:], *[1] * (input.dim() - 1 - mask.dim()))


def normalize(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` in one pass, of ``input``'s type."""
    if input.numel() == 0:
        return torch.empty_like(input)
    return torch.native_batch_norm(input, weight, bias, mean, var, False, 0.0, eps)[0]


def backward_sums(grad_output: Tensor, input: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rank's own sums of ``dy`` and of ``dy * x_hat``, with ``x_hat = (input - mean) / sqrt(var + eps)``.

    They are also the gradients of bias and weight.
    """
    if input.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
        grad_output, input, None, mean, var, None, None, False, eps, [False, True, True]
    )
    return sum_dy, sum_dy_xhat


def input_gradient(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
    eps: float,
) -> Tensor:
    """``weight / sqrt(var + eps) * (dy - mean_dy - x_hat * mean_dy_xhat)``, the means being over the global batch.

    Source: Ioffe and Szegedy 2015, section 3, with both sums divided by the number of values.
    """
    if input.numel() == 0:
        return torch.empty_like(input)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    # Everything but dy is an affine map of x_hat per channel, for which there is an operator of one pass.
    rest = normalize(input, mean, var, -scale * mean_dy_xhat, -scale * mean_dy, eps)
    per_channel = scale.view(-1, *[1] * (input.dim() - 2))  # (C, 1, ...)
    return rest.addcmul_(grad_output, per_channel.to(input.dtype))


def _masked_moments(input: Tensor, mask: Tensor) -> BatchMoments:
    """By filling what is masked with about the mean, where it adds next to nothing to take off again."""
    num_values = input.numel() // input.size(1)
    positions = over_positions(mask, input)  # (N, 1, ...)
    dims = [dim for dim in range(input.dim()) if dim != 1]
    count = positions.sum(dtype=torch.float64) * (num_values // mask.numel())
    safe_count = count.clamp(min=1)
    total = torch.where(positions, input, 0).sum(dims, dtype=statistics_dtype(input))
    filling = (total / safe_count).to(input.dtype)
    filled = torch.where(positions, input, filling.view(-1, *[1] * (input.dim() - 2)))
    mean, var = (moment.double() for moment in _mean_and_var(filled))
    deviation = mean - filling.double()  # of all num_values from the filling, of which only count have any
    squares = (var + deviation.square()) * (num_values / safe_count)
    deviation = deviation * (num_values / safe_count)
    present = count.clamp(max=1)
    own_mean = (filling.double() + deviation) * present
    return BatchMoments(count, own_mean, (squares - deviation.square()).clamp(min=0) * present)


def _mean_and_var(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a tensor that is not empty, by whatever is exact and fast for its format."""
    if torch.compiler.is_compiling():  # loops would be unrolled; what is left is fused, widening included
        var, mean = torch.var_mean(input.double(), [dim for dim in range(input.dim()) if dim != 1], correction=0)
        return mean, var
    if input.dtype == torch.float64 or input.numel() <= _SMALL:
        mean, var = torch.batch_norm_update_stats(input.double(), None, None, 0.0)
        return mean, var
    if input.device.type != "cpu":
        return deviation_moments(input)
    channels_last = input.movedim(1, -1)
    if channels_last.is_contiguous():
        columns = channels_last.view(-1, input.size(1))
        return _near_moments(columns) or _column_moments(columns)
    rows = input.contiguous().view(input.size(0), input.size(1), -1)
    if input.dtype == torch.float32:  # where sums along rows are faster than the operator, and exact
        return _row_moments(rows)
    return _near_moments(rows) or _row_moments(rows)


def _near_moments(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance of ``(M, C)`` or ``(N, C, S)`` by torch's operator; None if means are far from zero.

    The operator is fast, but sums in float32. So it is given so few values at a time that their sums are good to
    about 1e-6, which are then merged in float64; and its means are not used where, beyond some standard deviations,
    they lose the digits that the deviations need.
    """
    positions = values.numel() // (values.size(0) * values.size(1))
    blocks = torch.split(values, max(1, _FLOAT32_SUM // positions))
    # Buffers of float32 are how the operator is told to answer in it; with a momentum of 0 they stay as they are.
    running = None if values.dtype == torch.float32 else values.new_zeros(values.size(1), dtype=torch.float32)
    means, variances = zip(*(torch.batch_norm_update_stats(x, running, running, 0.0) for x in blocks), strict=True)
    mean, var = means[0].double(), variances[0].double()
    block_means = mean
    if len(blocks) > 1:
        shares = torch.tensor([[len(block) / len(values)] for block in blocks], dtype=torch.float64)
        block_means = torch.stack(means).double()
        mean = (block_means * shares).sum(0)
        within, between = torch.stack(variances), (block_means - mean).square_()
        var = (between.add_(within) * shares).sum(0)
    is_far = torch.addcmul(var, block_means, block_means, value=-1 / _NEAR**2).min().item() < 0
    return None if is_far else (mean, var)


def _row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``(N, C, S)`` by sums along rows, which vectorize."""
    count = rows.size(0) * rows.size(2)
    sample = rows[:: rows.numel() // _BLOCK | 1]
    rough_mean = sample.sum(-1, dtype=torch.float32).sum(0) / (sample.size(0) * sample.size(2))
    squares = torch.zeros_like(rough_mean, dtype=torch.float64)
    remainder = torch.zeros_like(squares)
    for block in torch.split(rows, max(1, _BLOCK // rows[0].numel())):
        deviation = block - rough_mean.unsqueeze(-1)
        remainder += deviation.sum(-1).sum(0, dtype=torch.float64)
        # Not a norm, which is as fast but adds up a long row in order: that costs 1e-4 in rows of a million.
        squares += deviation.square_().sum(-1).sum(0, dtype=torch.float64)
    return _corrected(rough_mean, remainder / count, squares / count)


def _column_moments(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``(M, C)`` by sums of rows, which vectorize where channels come last."""
    count, num_channels = columns.shape
    sample = columns[:: columns.numel() // _BLOCK | 1]  # odd, so as not to take one column of an image over and over
    rough_mean = sample.mean(0, dtype=torch.float32)
    squares = torch.zeros_like(rough_mean, dtype=torch.float64)
    remainder = torch.zeros_like(squares)
    for block in torch.split(columns, max(1, _BLOCK // num_channels)):
        deviation = block - rough_mean
        remainder += deviation.sum(0)
        squares += deviation.square_().sum(0)
    return _corrected(rough_mean, remainder / count, squares / count)


def _corrected(rough_mean: Tensor, remainder: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from deviations of a rough float32 mean: their own mean corrects both.

    This leaves an error near that of float64 for the mean and near that of exact deviations for the variance. The
    rough mean may come from every k-th part of the batch: whatever that holds, it is at most ``sqrt(k)`` standard
    deviations away, which costs the variance at most a factor of ``k`` in precision.
    """
    var = torch.addcmul(mean_square, remainder, remainder, value=-1).clamp_(min=0)
    return rough_mean.double() + remainder, var
