"""Which layers of a model keep running statistics, and under which names; the same on every rank."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, whose own forward would communicate; any other model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def tracked_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm that keeps running statistics, torch's or ours, by its path, in the order of modules.

    A layer that stands in several places is named once, by its first. `DistributedDataParallel` adds nothing to
    the path.

    Raises:
        ValueError: naming the path of a layer that is still lazy.
    """
    layers = {path: module for path, module in unwrapped(model).named_modules() if isinstance(module, _BatchNorm)}
    for path, layer in layers.items():
        check_has_size(path, layer)
    return {path: layer for path, layer in layers.items() if _is_tracked(layer)}


def check_has_size(path: str, layer: _BatchNorm) -> None:
    """Raise ValueError, naming ``path``, if ``layer`` is lazy and has seen no batch yet."""
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(
            f"{path or 'the module itself'} is a {type(layer).__name__} that has no size yet; "
            "run a batch through the model first"
        )


def running_moments(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The layer's running mean and (unbiased) variance in float64, ``(C,)`` each."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.detach().double(), layer.running_var.detach().double()


def input_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a BatchNorm is called with, as a hook sees it: the input, and the mask if there is one."""
    values: Tensor = args[0] if args else kwargs["input"]
    mask: Tensor | None = args[1] if len(args) > 1 else kwargs.get("mask")
    return values, mask


def _is_tracked(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_var is not None
