"""The gradient of batch normalization over ranks in operators that can be differentiated again, and again.

Slower than the kernels, and used only where a gradient is asked for with ``create_graph=True`` or by `torch.func`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn.agreement import Exchange
from syncbn.exchange import sum_over_ranks

_FURTHER = "further backward"


def differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    group: ProcessGroup | None,
    input_needs_grad: bool,
    layer: str = "",
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of input, weight and bias; the input's is None where it needs none.

    Shape: ``grad_output`` and ``input`` are ``(N, C, *)``, the last two gradients ``(C,)`` and the rank's own.
    Cost: one exchange of ``2C`` doubles if ``input_needs_grad``, and two of ``2C`` to differentiate it.
    Source: Ioffe and Szegedy 2015, section 3.
    """
    exchange = Exchange("backward", layer, input.size(1), input.dtype)
    dims = [dim for dim in range(input.dim()) if dim != 1]
    dy, x = grad_output.to(mean.dtype), input.to(mean.dtype)
    mean, var = _GlobalMoments.apply(x, count, mean, var, group, exchange)  # type: ignore[no-untyped-call]
    inverse_std = torch.rsqrt(var + eps)
    x_hat = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
    sum_dy, sum_dy_xhat = dy.sum(dims), (dy * x_hat).sum(dims)
    if not input_needs_grad:
        return None, sum_dy_xhat, sum_dy
    mean_dy, mean_dy_xhat = _mean_over_ranks([sum_dy, sum_dy_xhat], count, group, exchange)
    scale = inverse_std if weight is None else inverse_std * weight
    grad = _per_channel(scale, x) * (dy - _per_channel(mean_dy, x) - x_hat * _per_channel(mean_dy_xhat, x))
    return grad.to(input.dtype), sum_dy_xhat, sum_dy


class _GlobalMoments(torch.autograd.Function):
    """Mean and variance of all ranks' values, known already, as functions of this rank's ``input``."""

    @staticmethod
    def forward(
        input: Tensor, count: Tensor, mean: Tensor, var: Tensor, group: ProcessGroup | None, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        return mean.clone(), var.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.group, exchange = inputs
        ctx.exchange = exchange._replace(purpose=_FURTHER)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n values in all, ``d mean / dx = 1 / n`` and ``d var / dx = 2 (x - mean) / n``, for every loss."""
        input, count, mean, var = ctx.saved_tensors
        grad_mean, grad_var = _mean_over_ranks(list(grads), count, ctx.group, ctx.exchange)
        mean, _ = _GlobalMoments.apply(input, count, mean, var, ctx.group, ctx.exchange)  # type: ignore[no-untyped-call]
        deviation = input - _per_channel(mean, input)
        grad_input = _per_channel(grad_mean, input) + 2 * _per_channel(grad_var, input) * deviation
        return grad_input, None, None, None, None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's vector; as all ranks use it, its gradient is the sum of their gradients."""

    @staticmethod
    def forward(vector: Tensor, group: ProcessGroup | None, exchange: Exchange) -> Tensor:
        return sum_over_ranks(vector.clone(), group, exchange)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, exchange = inputs
        ctx.exchange = exchange._replace(purpose=_FURTHER)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total: Tensor = _SumOverRanks.apply(grad, ctx.group, ctx.exchange)  # type: ignore[no-untyped-call]
        return total, None, None


def _mean_over_ranks(
    sums: list[Tensor], count: Tensor, group: ProcessGroup | None, exchange: Exchange
) -> tuple[Tensor, ...]:
    """Each of ``sums``, ``(C,)``, added up over ranks and divided by ``count``; one exchange for all."""
    total = _SumOverRanks.apply(torch.cat(sums).double(), group, exchange)  # type: ignore[no-untyped-call]
    means: tuple[Tensor, ...] = (total / count.clamp(min=1)).to(sums[0].dtype).chunk(len(sums))
    return means


def _per_channel(values: Tensor, input: Tensor) -> Tensor:
    return values.view(-1, *[1] * (input.dim() - 2))  # (C, 1, ...)
