"""Batch normalization over all ranks as a function, with its two exchanges side by side."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import recomputation
from syncbn.agreement import Exchange
from syncbn.differentiable import differentiable_gradients
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
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalize ``input`` by the mean and variance of the batches of all ranks together, and track them.

    Shape: ``(N, C, *) -> (N, C, *)``; ``N`` and ``*`` may differ by rank and ``N`` may be 0. Per-channel arguments
        are ``(C,)``. ``mask`` is boolean, ``(N, *)`` or its first dimensions only: ``(N,)`` is one flag a sample.
    Units: ``running_mean`` as the input; ``running_var`` squared, unbiased over the global batch. Both move by
        ``momentum`` towards the batch, or with ``momentum=None`` are the mean over the batches counted by
        ``num_batches_tracked``. A global batch without any value leaves all three as they are.
    Masking: positions where ``mask`` is False count for nothing on any rank, whatever they hold, NaN included; the
        output and the gradient of the input are zero there. Ranks may pass a mask or not, each for itself.
    Gradients: ``input``'s is exact, through the statistics of all ranks, and may be differentiated again. Those of
        ``weight`` and ``bias`` are the rank's own sums: add them up over ranks, or let DistributedDataParallel
        average them as it does all others.
    Checkpointing: a recomputation inside a backward pass (`torch.utils.checkpoint`) tracks nothing, and takes the
        statistics of the first run instead of exchanging them again, save in a segment that contains a non-reentrant
        one, and in compiled code.
    Cost: one exchange of ``2C + 1`` doubles forward and, if ``input`` needs a gradient, one of ``2C`` backward (two
        more of ``2C`` for a gradient of that gradient); all ranks must call, empty ones included. Keeps ``input``
        and ``2C`` values for the backward. A mask makes training wait for the device, once.
    Raises: ValueError if the ranks together hold only one value per channel; judged after the exchange, so that
        every rank raises (inside `torch.compile` and CUDA graphs it is a RuntimeError of the device). ValueError if
        a per-channel argument is not ``(C,)``, if ``eps`` is not positive, if ``momentum`` is None without
        ``num_batches_tracked``, or if the mask fits no position of ``input``. TypeError under `torch.vmap`, which
        has no meaning for what all share.
    Source: Ioffe and Szegedy 2015, Algorithms 1 and 2.
    """
    return batch_norm_over(
        peers(process_group), input, running_mean, running_var, weight, bias, mask, num_batches_tracked, momentum, eps
    )


def batch_norm_over(
    group: ProcessGroup | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    layer: str = "",
    instead_of_tracking: Callable[[BatchMoments], None] | None = None,
) -> Tensor:
    """`sync_batch_norm` over a group of peers, or without one over this rank's own batch, in a layer of that name."""
    _check_channels(input, running_mean, running_var, weight, bias)
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None is the mean over all batches and needs num_batches_tracked; pass it too")
    if eps <= 0:
        raise ValueError(f"eps must be positive in training, where it keeps constant channels from NaN; got {eps}")
    if mask is not None:
        input = zero_where_masked(input, mask)
    known = None if group is None else recomputation.recall()  # alone there is nothing to be exchanged again
    output: Tensor
    is_transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    function = _SyncBatchNorm if is_transformed else _EagerSyncBatchNorm
    output, *moments = function.apply(input, mask, weight, bias, eps, group, layer, known)  # type: ignore[no-untyped-call]
    batch = BatchMoments(*moments)
    if group is not None:
        recomputation.remember(batch)
    if not recomputation.is_recomputing():
        _check_count(input, mask, batch)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            batch = replace(batch, count=recomputation.none_if_recomputing(batch.count))
        if instead_of_tracking is not None:
            instead_of_tracking(batch)
        elif running_mean is not None and running_var is not None:
            track(batch, running_mean, running_var, num_batches_tracked, momentum)
    return output if mask is None else zero_where_masked(output, mask)


def zero_where_masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` with zeros where ``mask`` is False, and with no gradient there, not even a NaN times zero.

    Raises:
        ValueError: if ``mask`` is not boolean, or its shape is not ``(N, *)`` of ``values`` or the start of it.
    """
    positions = values.shape[:1] + values.shape[2:]
    if mask.dtype != torch.bool or mask.dim() == 0 or mask.shape != positions[: mask.dim()]:
        raise ValueError(
            f"expected a boolean mask, True for what counts, of shape {tuple(positions)} or its first dimensions "
            f"only, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return torch.where(kernels.over_positions(mask, values), values, 0)


@torch.no_grad()
def track(
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


class _SyncBatchNorm(torch.autograd.Function):
    """Returns the output, then count, mean and biased variance of the global batch, which carry no gradient.

    Nothing in the backward knows of a mask: input and incoming gradient are zero wherever it is False.
    """

    @staticmethod
    def forward(
        input: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: ProcessGroup | None,
        layer: str,
        known: BatchMoments | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if known is None:
            local = kernels.local_moments(input, mask)

            # An empty rank joins too, with zeros: the others would wait for it.
            exchange = Exchange("forward", layer, input.size(1), input.dtype)
            batch = BatchMoments.unpack(sum_over_ranks(local.pack(), group, exchange))  # (2C + 1,)
        else:
            batch = known  # by every rank, as it is known from the same forward of all

        dtype = kernels.statistics_dtype(input)
        mean, var = batch.mean.to(dtype), batch.var.to(dtype)
        output = kernels.normalize(input, mean, var, _to(weight, dtype), _to(bias, dtype), eps)
        return output, batch.count, batch.mean, batch.var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, _, weight, bias, ctx.eps, ctx.group, ctx.layer, _ = inputs
        _, count, mean, var = output
        ctx.save_for_backward(input, weight, count, mean, var)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(count, mean, var)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        input, weight, count, mean, var = ctx.saved_tensors
        dtype = kernels.statistics_dtype(input)
        mean, var, scale = mean.to(dtype), var.to(dtype), _to(weight, dtype)
        if grad_output is None:  # no gradient came here: zeros, because the other ranks wait for our sums
            grad_output = torch.zeros_like(input)

        grad_input = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # someone will differentiate this again
            grad_input, sum_dy_xhat, sum_dy = differentiable_gradients(
                grad_output, input, scale, count, mean, var, ctx.eps, ctx.group, ctx.needs_input_grad[0], ctx.layer
            )
        else:
            sum_dy, sum_dy_xhat = kernels.backward_sums(grad_output, input, mean, var, ctx.eps)
            if ctx.needs_input_grad[0]:
                # An empty rank joins here too, as it did in the forward.
                exchange = Exchange("backward", ctx.layer, input.size(1), input.dtype)
                total = sum_over_ranks(torch.cat([sum_dy, sum_dy_xhat]).double(), ctx.group, exchange)  # (2C,)

                dy, dy_xhat = (total / count.clamp(min=1)).to(dtype).chunk(2)  # means over the global batch
                grad_input = kernels.input_gradient(grad_output, input, mean, var, scale, dy, dy_xhat, ctx.eps)

        grad_weight = sum_dy_xhat.to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_bias = sum_dy.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return grad_input, None, grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def vmap(*_: Any) -> tuple[Any, Any]:
        raise TypeError(
            "torch.vmap cannot map a layer that normalizes by the batch and the ranks' together: every mapped slice "
            "would be a batch of its own; map it in evaluation mode, or loop over the slices"
        )


class _EagerSyncBatchNorm(torch.autograd.Function):
    """The same with a context from the start: `torch.func` cannot take this form, small layers want its lower cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _SyncBatchNorm.forward(*inputs)
        _SyncBatchNorm.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_SyncBatchNorm.backward)


def _check_channels(input: Tensor, *per_channel: Tensor | None) -> None:
    """Refuse what the operators would not, which read as many values as ``input`` has channels, wherever they are."""
    if input.dim() < 2:
        raise ValueError(f"expected an input (N, C, *) of two or more dimensions, got shape {tuple(input.shape)}")
    shape = input.shape[1:2]
    for values in per_channel:
        if values is not None and values.shape != shape:
            raise ValueError(
                f"expected one value per channel, shape {tuple(shape)} for an input of shape {tuple(input.shape)}, in "
                f"running statistics, weight and bias; got shape {tuple(values.shape)}"
            )


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _check_count(input: Tensor, mask: Tensor | None, batch: BatchMoments) -> None:
    """Refuse a global batch of one value per channel: its variance is nothing.

    Reading the count waits for the device. Without a mask only ranks with fewer than two values of their own do, and
    they are all the ranks where the total is below two. Where nothing can be read, the device itself is told to fail.
    """
    if mask is None and input.numel() >= 2 * input.size(1):
        return
    message = "expected more than one value per channel over all ranks in training, got one"
    remedy = "enlarge the batch or drop the last, smaller one"
    if torch.compiler.is_compiling() or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(batch.count != 1, f"{message}; {remedy}")
    elif batch.count.item() == 1:
        raise ValueError(f"{message} ({tuple(input.shape)} on this rank); {remedy}")
