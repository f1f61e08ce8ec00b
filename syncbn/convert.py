"""Turn a model's BatchNorm layers into SyncBatchNorm and back, losing nothing on either way."""

import copy
from functools import cache
from types import new_class
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from syncbn.batchnorm import SyncBatchNorm
from syncbn.layers import check_has_size
from syncbn.naming import name_layers

_ORIGINAL_CLASS = "_original_class"
_TORCHS_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CONVERTIBLE_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
_CLASS_BY_INPUT_DIMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def convert_sync_batchnorm(module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Make every BatchNorm of ``module`` synchronize over ``process_group``; returns ``module``.

    Layers are changed in place and stay the objects they are: parameters, buffers, hooks, flags, parametrizations
    and attributes are not touched, a layer in two places stays one, and an optimizer made before goes on. Converted
    are torch's BatchNorm1d, 2d, 3d and SyncBatchNorm, and subclasses that inherit their forward; what these add or
    override otherwise, such as ``train``, they keep, and remain of their class. Layers that synchronize already get
    ``process_group``; None leaves them the one they have. Each is named by its path in ``module``, see `name_layers`.

    Raises:
        ValueError: naming the path of a BatchNorm with a forward of its own, of one that is still lazy, and of one
            that `torch.jit.script` has compiled, before anything is changed.
    """
    layers: list[_BatchNorm] = []
    for path, layer in module.named_modules():
        _check_not_scripted(path, layer)
        if isinstance(layer, _BatchNorm):
            _check_convertible(path, layer)
            layers.append(layer)
    for layer in layers:
        _convert(layer, process_group)
    return name_layers(module)


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Give every layer that `convert_sync_batchnorm` changed its own class again; returns ``module``.

    In place and lossless as the conversion; only torch's own SyncBatchNorm keeps a group that it was given meanwhile.
    Parametrizations are those of now, also where some came or went meanwhile.
    A SyncBatchNorm that was built as such becomes torch's BatchNorm for the inputs it last saw: BatchNorm1d for 2-d
    and 3-d, BatchNorm3d for 5-d, else BatchNorm2d, also if it saw none.
    """
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and (_ORIGINAL_CLASS in vars(layer) or _is_plainly_ours(layer)):
            _revert(layer)
    return module


def _check_convertible(path: str, layer: _BatchNorm) -> None:
    kind = _plain_class(layer)
    check_has_size(path, layer)
    if not isinstance(layer, SyncBatchNorm) and kind.forward not in _CONVERTIBLE_FORWARDS:
        raise ValueError(
            f"{path or 'the module itself'} is a {kind.__name__} with a forward of its own, which a conversion would "
            f"drop; replace it by torch.nn.BatchNorm and what it adds by a module behind it"
        )


def _check_not_scripted(path: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in str(module.original_name):
        raise ValueError(
            f"{path or 'the module itself'} is a {module.original_name} compiled by torch.jit.script, which cannot be "
            f"changed any more; convert the model first"
        )


def _convert(layer: _BatchNorm, process_group: ProcessGroup | None) -> None:
    if not isinstance(layer, SyncBatchNorm):
        layer.__dict__[_ORIGINAL_CLASS] = _plain_class(layer)
        layer.__dict__.setdefault("process_group", None)
        _change_class(layer, _synchronized(layer.__dict__[_ORIGINAL_CLASS]))
    if process_group is not None:
        layer.__dict__["process_group"] = process_group


def _revert(layer: SyncBatchNorm) -> None:
    original: type[_BatchNorm] | None = layer.__dict__.pop(_ORIGINAL_CLASS, None)
    num_dims = layer.__dict__.pop("_num_input_dims", None)
    layer.__dict__.pop("layer_name", None)
    if original is None:
        original = _CLASS_BY_INPUT_DIMS.get(num_dims, nn.BatchNorm2d)
    if not issubclass(original, nn.SyncBatchNorm):
        del layer.__dict__["process_group"]
    _change_class(layer, original)


@cache
def _synchronized(kind: type[Any]) -> type[SyncBatchNorm]:
    """SyncBatchNorm, or for other than torch's classes a subclass of it that has whatever ``kind`` has besides."""
    if kind in _TORCHS_CLASSES:
        return SyncBatchNorm
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__reduce_ex__": _reduce_by_original_class}
    # `new_class` and not `type`, because a class may have a metaclass of its own.
    return new_class(f"Sync{kind.__name__}", (SyncBatchNorm, kind), exec_body=lambda body: body.update(namespace))


def _reduce_by_original_class(layer: SyncBatchNorm, protocol: SupportsIndex) -> tuple[Any, ...]:
    """How a layer is pickled whose class no module holds: by the class that it was converted from."""
    _, _, state, *_ = SyncBatchNorm.__reduce_ex__(layer, protocol)
    return _empty_layer, (layer.__dict__[_ORIGINAL_CLASS],), state


def _empty_layer(original: Any) -> SyncBatchNorm:
    kind = _synchronized(original)
    return kind.__new__(kind)


def _is_plainly_ours(layer: SyncBatchNorm) -> bool:
    return _plain_class(layer) is SyncBatchNorm


def _plain_class(layer: _BatchNorm) -> type[_BatchNorm]:
    """The layer's class without what `torch.nn.utils.parametrize` derives from it."""
    kind = type(layer)
    if is_parametrized(layer):
        (kind,) = kind.__bases__
    return kind


def _change_class(layer: _BatchNorm, kind: type[_BatchNorm]) -> None:
    """Make ``layer`` a ``kind``, with the properties by which a parametrized layer computes its tensors."""
    if not is_parametrized(layer):
        layer.__class__ = kind
        return
    derived = type(layer)
    namespace: dict[str, Any] = {name: value for name, value in vars(derived).items() if isinstance(value, property)}
    namespace["__getstate__"] = vars(derived)["__getstate__"]  # torch refuses to pickle such a layer
    if not hasattr(kind, "__deepcopy__"):  # else copying would pickle
        namespace["__deepcopy__"] = _deepcopy_attributes
    layer.__class__ = type(f"Parametrized{kind.__name__}", (kind,), namespace)


def _deepcopy_attributes(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copied: nn.Module = type(layer).__new__(type(layer))
    memo[id(layer)] = copied
    copied.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return copied
