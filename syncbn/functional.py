"""Batch normalization over all ranks as a function, with its two exchanges side by side."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from syncbn.exchange import peers, sum_over_ranks
from syncbn.kernels import aten as kernels
from syncbn.moments import BatchMoments


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalize ``input`` by the mean and variance of the batches of all ranks together, and track them.

    Shape: ``(N, C, *) -> (N, C, *)``; ``N`` and ``*`` may differ by rank and ``N`` may be 0. Per-channel arguments
        are ``(C,)``.
    Units: ``running_mean`` as the input; ``running_var`` squared, unbiased over the global batch. Both move by
        ``momentum`` towards the batch, or with ``momentum=None`` are the mean over the batches counted by
        ``num_batches_tracked``. A global batch without any value leaves all three as they are.
    Gradients: ``input``'s is exact, through the statistics of all ranks. Those of ``weight`` and ``bias`` are the
        rank's own sums: add them up over ranks, or let DistributedDataParallel average them as it does all others.
    Cost: one exchange of ``2C + 1`` doubles forward and, if ``input`` needs a gradient, one of ``2C`` backward; all
        ranks must call, empty ones included. Keeps ``input`` and ``2C`` values for the backward.
    Raises: ValueError if the ranks together hold only one value per channel; judged after the exchange, so that
        every rank raises. ValueError if ``momentum`` is None without ``num_batches_tracked``.
    Source: Ioffe and Szegedy 2015, Algorithms 1 and 2.
    """
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None is the mean over all batches and needs num_batches_tracked; pass it too")
    output: Tensor
    output, *moments = _SyncBatchNorm.apply(input, weight, bias, eps, peers(process_group))  # type: ignore[no-untyped-call]
    batch = BatchMoments(*moments)
    _check_count(input, batch)
    if running_mean is not None and running_var is not None:
        _track(batch, running_mean, running_var, num_batches_tracked, momentum)
    return output


class _SyncBatchNorm(torch.autograd.Function):
    """Returns the output, then count, mean and biased variance of the global batch, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = kernels.local_moments(input)

        # An empty rank joins too, with zeros: the others would wait for it.
        batch = BatchMoments.unpack(sum_over_ranks(local.pack(), group))  # (2C + 1,)

        dtype = kernels.statistics_dtype(input)
        mean, var = batch.mean.to(dtype), batch.var.to(dtype)
        output = kernels.normalize(input, mean, var, _to(weight, dtype), _to(bias, dtype), eps)

        ctx.save_for_backward(input, weight, mean, var, batch.count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(batch.count, batch.mean, batch.var)
        ctx.set_materialize_grads(False)
        return output, batch.count, batch.mean, batch.var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, count = ctx.saved_tensors
        if grad_output is None:  # no gradient came here: zeros, because the other ranks wait for our sums
            grad_output = torch.zeros_like(input)
        sum_dy, sum_dy_xhat = kernels.backward_sums(grad_output, input, mean, var, ctx.eps)

        grad_input = None
        if ctx.needs_input_grad[0]:
            # An empty rank joins here too, as it did in the forward.
            total = sum_over_ranks(torch.cat([sum_dy, sum_dy_xhat]).double(), ctx.group)  # (2C,)

            mean_dy, mean_dy_xhat = (total / count.clamp(min=1)).to(mean.dtype).chunk(2)
            scale = _to(weight, mean.dtype)
            grad_input = kernels.input_gradient(grad_output, input, mean, var, scale, mean_dy, mean_dy_xhat, ctx.eps)

        grad_weight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = sum_dy.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _check_count(input: Tensor, batch: BatchMoments) -> None:
    """Refuse a global batch of one value per channel: its variance is nothing.

    Reading the count waits for the device. Only ranks with fewer than two values of their own do, and they are all
    the ranks where the total is below two.
    """
    if input.numel() < 2 * input.size(1) and batch.count.item() == 1:
        raise ValueError(
            f"expected more than one value per channel over all ranks in training, got one ({tuple(input.shape)} on "
            f"this rank); enlarge the batch or drop the last, smaller one"
        )


@torch.no_grad()
def _track(
    batch: BatchMoments,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Move the running statistics towards the batch; by nothing if the batch is empty, without asking the device."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(batch.count > 0)
    factor = batch.count.clamp(max=1)
    if momentum is not None:
        factor = factor * momentum
    elif num_batches_tracked is not None:
        factor = factor / num_batches_tracked.clamp(min=1)
    running_mean.copy_(running_mean.double().lerp_(batch.mean, factor))
    running_var.copy_(running_var.double().lerp_(batch.unbiased_var, factor))
