"""Turn a model's BatchNorm layers into SyncBatchNorm and back, losing nothing on either way."""

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from syncbn.batchnorm import SyncBatchNorm

_ORIGINAL_CLASS = "_original_class"
_CONVERTIBLE_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
_CLASS_BY_INPUT_DIMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def convert_sync_batchnorm(module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
    """Make every BatchNorm of ``module`` synchronize over ``process_group``; returns ``module``.

    Layers are changed in place and stay the objects they are: parameters, buffers, hooks, flags and attributes are
    not touched, a layer in two places stays one, and an optimizer made before goes on. Converted are torch's
    BatchNorm1d, 2d, 3d and SyncBatchNorm, and subclasses that inherit their forward. Layers that synchronize
    already get ``process_group``; None leaves them the one they have.

    Raises:
        ValueError: naming the path of a BatchNorm with a forward of its own, of one that is parametrized and of one
            that is still lazy, before anything is changed.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    for path, layer in layers.items():
        _check_convertible(path or "the module itself", layer)
    for layer in layers.values():
        _convert(layer, process_group)
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Give every layer that `convert_sync_batchnorm` changed its own class again; returns ``module``.

    In place and lossless as the conversion; only torch's own SyncBatchNorm keeps a group that it was given meanwhile.
    A SyncBatchNorm that was built as such becomes torch's BatchNorm for the inputs it last saw: BatchNorm1d for 2-d
    and 3-d, BatchNorm3d for 5-d, else BatchNorm2d, also if it saw none.
    """
    for layer in module.modules():
        if type(layer) is SyncBatchNorm:
            _revert(layer)
    return module


def _check_convertible(path: str, layer: _BatchNorm) -> None:
    kind = type(layer)
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(f"{path} is a {kind.__name__} that has no size yet; run a batch through the model first")
    if is_parametrized(layer):
        raise ValueError(
            f"{path} has parametrized tensors; remove the parametrizations, convert, and register them again"
        )
    if kind.forward not in _CONVERTIBLE_FORWARDS:
        raise ValueError(
            f"{path} is a {kind.__name__} with a forward of its own, which a conversion would drop; "
            f"replace it by torch.nn.BatchNorm and what it adds by a module behind it"
        )


def _convert(layer: _BatchNorm, process_group: ProcessGroup | None) -> None:
    if not isinstance(layer, SyncBatchNorm):
        layer.__dict__[_ORIGINAL_CLASS] = type(layer)
        layer.__dict__.setdefault("process_group", None)
        layer.__class__ = SyncBatchNorm
    if process_group is not None:
        layer.__dict__["process_group"] = process_group


def _revert(layer: SyncBatchNorm) -> None:
    original: type[_BatchNorm] | None = layer.__dict__.pop(_ORIGINAL_CLASS, None)
    num_dims = layer.__dict__.pop("_num_input_dims", None)
    if original is None:
        original = _CLASS_BY_INPUT_DIMS.get(num_dims, nn.BatchNorm2d)
    if not issubclass(original, nn.SyncBatchNorm):
        del layer.__dict__["process_group"]
    layer.__class__ = original  # type: ignore[assignment]  # the narrowing ends here
