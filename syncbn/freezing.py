"""Freezing BatchNorm layers: a mode in which nothing about them changes, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.layers import check_has_size

_BEFORE = "_before_freeze"


def freeze(model: nn.Module) -> nn.Module:
    """Fix statistics, weight and bias of every BatchNorm of ``model``, torch's or ours; returns ``model``.

    A frozen layer normalizes by its running statistics in every mode, and so does not communicate. It stays in
    evaluation mode whatever ``train()`` is called on (the mode asked for is remembered), its parameters ask for no
    gradient and those they had are dropped, so that an optimizer passes them by. Nothing else changes: class, hooks
    and state dict are as before, and a frozen layer may be copied, pickled, converted and reverted. Layers that are
    frozen already are left alone.

    DistributedDataParallel decides when it is made which gradients it exchanges: freeze and unfreeze the plain model,
    before it is wrapped. Frozen while wrapped, training usually ends in the second step ("Expected to have finished
    reduction"); unfrozen while wrapped, ranks would drift apart, each by its own gradients. Both are refused where
    the wrapper is in ``model``.

    Where a layer is to be fixed for good, for instance for export, `syncbn.normalizers.FrozenBatchNorm` puts a
    module without parameters in its place.

    Raises:
        ValueError: naming the path of a layer without running statistics, still lazy or in DistributedDataParallel,
            before anything is changed.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    layers = {path: layer for path, layer in layers.items() if not is_frozen(layer)}
    for path, layer in layers.items():
        _check_freezable(path, layer)
    _check_not_wrapped(model, [layer for layer in layers.values() if any(_requires_grad(layer).values())])
    # All flags are read before any is changed: layers may share parameters.
    before = {layer: _Before(layer.training, _requires_grad(layer)) for layer in layers.values()}
    for layer, state in before.items():
        _freeze(layer, state)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze` in every frozen layer of ``model``; returns ``model``.

    Each parameter asks for a gradient if it did before, and each layer has the mode that it would have if it had
    never been frozen: that of the last ``train()`` or ``eval()`` since, else the one before.

    Raises:
        ValueError: naming the path of a layer in DistributedDataParallel, before anything is changed; see `freeze`.
    """
    frozen = [module for module in model.modules() if is_frozen(module)]
    _check_not_wrapped(model, [layer for layer in frozen if any(layer.__dict__[_BEFORE].requires_grad.values())])
    for layer in frozen:
        unfreeze_layer(layer)
    return model


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that `freeze` has frozen."""
    return _BEFORE in module.__dict__


@dataclass(frozen=True)
class _Before:
    """What a layer is given back: its mode, and by parameter whether it asks for a gradient."""

    training: bool
    requires_grad: dict[str, bool]


def _check_freezable(path: str, layer: _BatchNorm) -> None:
    check_has_size(path, layer)
    if layer.running_mean is None:
        raise ValueError(
            f"{path or 'the module itself'} keeps no running statistics, so that there is nothing to fix it at; "
            f"build it with track_running_stats=True"
        )


def _check_not_wrapped(model: nn.Module, changing: Sequence[nn.Module]) -> None:
    """Refuse layers whose parameters begin or cease to ask for gradients inside a wrapper that counts on them."""
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            paths = [path for path, module in wrapper.module.named_modules() if module in changing]
            if paths:
                raise ValueError(
                    f"{paths[0]} is in DistributedDataParallel, which exchanges the gradients that were wanted when "
                    "it was made, no more and no fewer; freeze or unfreeze its .module, then wrap that anew"
                )


def _requires_grad(layer: _BatchNorm) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in layer.named_parameters()}


def _freeze(layer: _BatchNorm, before: _Before) -> None:
    layer.eval()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    layer.__dict__[_BEFORE] = before
    # In place of the method: a partial, unlike a closure, is copied and pickled along with the layer.
    layer.__dict__["train"] = partial(_note_mode, layer)


def _note_mode(layer: _BatchNorm, mode: bool = True) -> _BatchNorm:
    """What ``train`` and ``eval`` do to a frozen layer."""
    layer.__dict__[_BEFORE] = replace(layer.__dict__[_BEFORE], training=mode)
    return layer


def unfreeze_layer(layer: nn.Module) -> None:
    """Undo `freeze` in a single frozen ``layer``, whatever wraps it."""
    before: _Before = layer.__dict__.pop(_BEFORE)
    del layer.__dict__["train"]
    layer.train(before.training)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(before.requires_grad.get(name, parameter.requires_grad))
