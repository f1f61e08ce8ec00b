"""The rank's own share of batch normalization in torch operators: any device, any memory format, no host wait.

Shapes: ``input`` and ``grad_output`` are ``(N, C, *)``, everything per channel ``(C,)``.
"""

import torch
from torch import Tensor

from syncbn.moments import BatchMoments

_SMALL = 1 << 16  # values; below it, doubling a tensor's width costs less than a look at its layout
_BLOCK = 1 << 18  # values; a megabyte of float32 stays in cache between two passes


def statistics_dtype(input: Tensor) -> torch.dtype:
    """The type of per-channel values beside ``input``: its own, but never below float32."""
    return torch.promote_types(input.dtype, torch.float32)


def local_moments(input: Tensor) -> BatchMoments:
    """Moments of the rank's own values; those of none where ``input`` is empty.

    Accuracy: at a mean of 1e4 standard deviations the variance is good to about 1e-5 for contiguous float32, and to
    1e-3 for large float32 inputs in a channels-last format, whose operator accumulates in float32.
    Cost: two passes over ``input``.
    """
    num_channels = input.size(1)
    if input.numel() == 0:
        return BatchMoments.empty(num_channels, input.device)
    if input.device.type != "cpu" or input.dtype == torch.float64:
        mean, var = _operator_moments(input)
    elif input.numel() <= _SMALL:
        mean, var = _operator_moments(input.double())
    elif input.dtype == torch.float32 and input.dim() > 2 and input.is_contiguous():
        mean, var = _row_moments(input.view(input.size(0), num_channels, -1))
    else:
        mean, var = _operator_moments(input)
    count = torch.full((), input.numel() // num_channels, dtype=torch.float64, device=input.device)
    return BatchMoments(count, mean.double(), var.double())


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


def _operator_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by torch's own operator, at least in float32."""
    running = None
    if input.dtype != statistics_dtype(input):  # buffers of float32 are how the operator is told to answer in it
        running = torch.zeros(input.size(1), dtype=torch.float32, device=input.device)
    mean, var = torch.batch_norm_update_stats(input, running, running, 0.0)
    return mean, var


def _row_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``(N, C, S)`` float32 by sums along rows, which vectorize.

    The first mean is rounded to float32 and deviations are taken from it; their own mean then corrects both results,
    which leaves an error near that of float64 for the mean and near that of exact deviations for the variance.
    """
    count = rows.size(0) * rows.size(2)
    rough_mean = (rows.sum(-1).sum(0, dtype=torch.float64) / count).float()
    squares = torch.zeros_like(rough_mean, dtype=torch.float64)
    remainder = torch.zeros_like(squares)
    for block in torch.split(rows, max(1, _BLOCK // rows[0].numel())):
        deviation = block - rough_mean.unsqueeze(-1)
        squares += torch.linalg.vector_norm(deviation, dim=-1).double().square_().sum(0)
        remainder += deviation.sum(-1).sum(0, dtype=torch.float64)
    remainder /= count
    var = torch.addcmul(squares / count, remainder, remainder, value=-1).clamp_(min=0)
    return rough_mean.double() + remainder, var
