"""A copy of a model with its BatchNorms folded away."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from syncbn.batchnorm import SyncBatchNorm
from syncbn.convert import revert_sync_batchnorm
from syncbn.inference.plan import CALLED_WITH_A_MASK, Norm, plan_for, serving_copy
from syncbn.normalizers.swap import forget_batchnorm, put_in_place

_logger = logging.getLogger(__name__)


def fold_batchnorm(model: nn.Module, example_input: Any = None) -> nn.Module:
    """A copy of ``model`` for serving, with every BatchNorm folded away that can be; the plan is logged (INFO).

    The copy is in evaluation mode whatever the mode of ``model``, which is not touched, and computes what ``model``
    computes in evaluation, up to rounding. It is for inference only: training it is not training ``model``. Its
    modules are those of ``model`` by path and class, save that a folded BatchNorm is `torch.nn.Identity`, and that
    a BatchNorm that is left is torch's own (a SyncBatchNorm that was built as such becomes what
    `revert_sync_batchnorm` makes of it, so run a batch or give an example). Of BatchNorm nothing of `syncbn` remains,
    unless a layer is called with a mask, or a FrozenBatchNorm or a GhostBatchNorm was built by hand and is left. Of
    DistributedDataParallel, the module inside is copied.

    See `plan_folding` for which are folded and for ``example_input``.

    Cost: a copy of the model, a symbolic trace, and ``O(weights)`` arithmetic in float64, rounded once, on the CPU.
    """
    copied = serving_copy(model)
    plan = plan_for(copied, example_input)
    _logger.info("folding BatchNorm:\n%s", plan)
    modules = dict(copied.named_modules())
    for path, layer in plan.folded.items():
        _fold(modules[layer], modules[path])
    folded = put_in_place(copied, {modules[path]: nn.Identity() for path in plan.folded})
    forget_batchnorm(folded)
    for path, module in folded.named_modules():
        if isinstance(module, SyncBatchNorm) and plan.left[path] != CALLED_WITH_A_MASK:
            revert_sync_batchnorm(module)
    return folded.eval()


# torch.nn.utils.fusion does the same for most pairs, but in the weights' own precision, and neither for a Linear before
# a BatchNorm without weight nor for a transposed convolution in groups.
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Give ``layer`` the weight and bias of both: ``scale * (W x + b) + shift``, channel by channel."""
    assert isinstance(norm, Norm)
    scale, shift = _affine_map(norm)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    if isinstance(bias, Tensor):
        shift = shift + scale * _exact(bias)
    layer.weight = nn.Parameter(_scaled(layer, _exact(weight), scale).to(weight), weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight), weight.requires_grad)


def _affine_map(norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel, ``(C,)`` each in float64: ``norm(x) = scale * x + shift`` in evaluation."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -scale * _exact(norm.running_mean)
    return scale, shift if norm.bias is None else shift + _exact(norm.bias)


def _scaled(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` with what makes each output channel multiplied by the channel's ``scale``."""
    positions = [1] * (weight.dim() - 2)
    if not isinstance(layer, _ConvTransposeNd):
        return weight * scale.reshape(-1, 1, *positions)
    # (C_in, C_out / groups, *): the inputs of a group, one group after another, each with that group's outputs.
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return (grouped * scale.reshape(layer.groups, 1, -1, *positions)).reshape(weight.shape)


def _exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU: some devices have none."""
    return tensor.detach().to("cpu", torch.float64)
