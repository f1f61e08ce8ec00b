"""What stands in for an ordinary synchronized BatchNorm on CPUs, where torch's own does not run: the plain formula.

Mean and mean of squares go through one all-reduce that autograd differentiates; everything else is left to autograd.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NaiveSyncBatchNorm(_BatchNorm):
    """Batch normalization over all ranks of the default group, which must hold batches of one size.

    Shape: ``(N, C, *) -> (N, C, *)``.
    Cost: an all-reduce of ``2C`` values of the input's type in the forward and one in the backward.
    Accuracy: the variance is a difference of means, as the formula has it; it fails where the mean is large.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the mean and biased variance over all ranks; evaluation is torch's."""
        if not self.training:
            return super().forward(input)
        mean, var = _global_moments(input)
        self._track(mean.detach(), var.detach(), input.numel() // input.size(1) * dist.get_world_size())
        scale = self.weight * torch.rsqrt(var + self.eps)
        bias = self.bias - mean * scale
        per_channel = (1, -1, *[1] * (input.dim() - 2))
        return input * scale.view(per_channel) + bias.view(per_channel)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


def with_naive_layers(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of ``model`` a `NaiveSyncBatchNorm`, in place; returns ``model``."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = NaiveSyncBatchNorm
    return model


def _global_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    dims = [dim for dim in range(input.dim()) if dim != 1]
    packed = torch.cat([input.mean(dims), (input * input).mean(dims)])
    mean, mean_square = (_AllReduce.apply(packed) / dist.get_world_size()).chunk(2)  # type: ignore[no-untyped-call]
    return mean, mean_square - mean * mean


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        total = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
