"""Put another normalizer in the place of every BatchNorm of a model, and take the BatchNorms back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from syncbn.batchnorm import SyncBatchNorm
from syncbn.layers import check_has_size
from syncbn.normalizers.ghost import GhostBatchNorm
from syncbn.normalizers.specs import Normalizer

_REPLACED = "_replaced_batchnorm"


def replace_batchnorm(model: nn.Module, normalizer: Normalizer) -> nn.Module:
    """Put what ``normalizer`` builds in the place of every BatchNorm of ``model``; returns the model.

    Replaced are torch's BatchNorm1d, 2d, 3d and SyncBatchNorm, ours, ghost batch norm, and what an earlier call put
    in their place. Parameters that the new layer has a place for are shared, not copied; mode, device and type are
    the old layer's; a layer in several places stays one. The BatchNorms are kept, out of sight of ``state_dict``
    and ``parameters``, for `restore_batchnorm`. Forward hooks stay with them.

    The model changes in place; only if it is itself a BatchNorm, another module is returned. To train under
    DistributedDataParallel, wrap after replacing.

    Raises:
        ValueError: naming the path of a layer that cannot be replaced and what to do, before anything is changed.
    """
    stand_ins: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        batchnorm = _batchnorm_behind(module)
        if batchnorm is not None:
            path = path or "the model itself"
            _check_replaceable(path, batchnorm)
            stand_ins[module] = _stand_in(path, batchnorm, normalizer, module.training)
    return put_in_place(model, stand_ins)


def restore_batchnorm(model: nn.Module, *, only: tuple[type[nn.Module], ...] = (nn.Module,)) -> nn.Module:
    """Put every BatchNorm back that `replace_batchnorm` replaced by one of the types ``only``; returns the model.

    They are the same modules, with the same parameters and buffers: bit for bit as they were, save what training
    changed meanwhile in tensors that both shared. Their mode, device and type are those of their stand-ins (where
    stand-ins hold no tensor of theirs, as of a BatchNorm without weight, move the model after restoring).
    """
    originals: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if _REPLACED in module.__dict__ and isinstance(module, only):
            original = _batchnorm_behind(module)
            assert original is not None
            originals[module] = original
    return put_in_place(model, originals)


def forget_batchnorm(model: nn.Module) -> None:
    """Make every replacement in ``model`` final: the BatchNorms kept for `restore_batchnorm` are let go."""
    for module in model.modules():
        module.__dict__.pop(_REPLACED, None)


def put_in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each key's value wherever the key stands in ``model``; returns the model, or what replaces it as a whole."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


@dataclass(frozen=True)
class _Replaced:
    """A BatchNorm out of use, and what is to be known when it returns."""

    batchnorm: _BatchNorm
    shares_statistics: bool
    dtype: torch.dtype | None
    """Of the weight when it was replaced."""


def _stand_in(path: str, batchnorm: _BatchNorm, normalizer: Normalizer, training: bool) -> nn.Module:
    layer = normalizer.build(path, batchnorm).train(training)
    statistics = batchnorm.running_mean
    # Past nn.Module's own bookkeeping, which would make the BatchNorm a part of the model again.
    layer.__dict__[_REPLACED] = _Replaced(
        batchnorm,
        shares_statistics=statistics is not None and layer._buffers.get("running_mean") is statistics,
        dtype=None if batchnorm.weight is None else batchnorm.weight.dtype,
    )
    return layer


def _batchnorm_behind(module: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that ``module`` is, or stands in for, brought up to date; None if neither."""
    replaced = module.__dict__.get(_REPLACED)
    if replaced is None:
        return module if isinstance(module, _BatchNorm) else None
    assert isinstance(replaced, _Replaced)
    _bring_up_to_date(replaced, module)
    return replaced.batchnorm


def _bring_up_to_date(replaced: _Replaced, stand_in: nn.Module) -> None:
    """What was shared is the stand-in's now, also where a move or a load put new tensors; the rest moves after it."""
    batchnorm = replaced.batchnorm
    batchnorm.train(stand_in.training)
    for name, parameter in batchnorm.named_parameters(recurse=False):
        if name in stand_in._parameters:
            batchnorm._parameters[name] = stand_in._parameters[name]
        elif name in stand_in._buffers:  # frozen, by value
            _set_value(parameter, stand_in._buffers[name])
    if replaced.shares_statistics:
        batchnorm._buffers.update({name: stand_in._buffers[name] for name in batchnorm._buffers})
    _move_after_weight(replaced)


def _move_after_weight(replaced: _Replaced) -> None:
    """Device, and type if it changed, of all tensors as the weight's; no new tensor where nothing changes."""
    batchnorm = replaced.batchnorm
    weight = batchnorm.weight
    if weight is None:
        return
    for name, buffer in batchnorm.named_buffers(recurse=False):
        batchnorm._buffers[name] = _moved(buffer, weight, replaced.dtype)
    if batchnorm.bias is not None:
        batchnorm.bias.data = _moved(batchnorm.bias.data, weight, replaced.dtype)


def _moved(tensor: Tensor, weight: Tensor, dtype_before: torch.dtype | None) -> Tensor:
    casts = tensor.is_floating_point() and weight.dtype != dtype_before
    return tensor.to(device=weight.device, dtype=weight.dtype if casts else tensor.dtype)


def _set_value(parameter: nn.Parameter, value: Tensor | None) -> None:
    assert value is not None
    parameter.data = parameter.data.to(value)
    parameter.data.copy_(value)


_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, GhostBatchNorm.forward)


def _check_replaceable(path: str, batchnorm: _BatchNorm) -> None:
    kind = type(batchnorm)
    check_has_size(path, batchnorm)
    if is_parametrized(batchnorm):
        raise ValueError(f"{path} has parametrized tensors; remove the parametrizations before it is replaced")
    if kind.forward not in _KNOWN_FORWARDS:
        raise ValueError(
            f"{path} is a {kind.__name__} with a forward of its own, of which nothing would remain; "
            "replace it by torch.nn.BatchNorm and what it adds by a module behind it"
        )
