"""Where a loss that is not finite came from: the first tensor that is not finite, in the order in which a step uses it.

The step is gone through once more, by this rank alone and on a copy of the model, so that nothing that trains is
touched and no other rank is waited for. A rank whose own batch gives finite numbers was handed them by another one,
by the statistics or gradients that they share.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.jobs import NonFinite, NonFinitePlace
from service.training.lone_copy import lone_copy


def first_non_finite(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    step: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> NonFinite:
    """The first tensor that is not finite when ``model``, as it stands before its update, meets this batch.

    Images come first, then, module by module as they run: parameters, running statistics where the layer normalizes by
    them (in training it does not, and this step has written to them already), output; then the loss. BatchNorm layers
    normalize by this rank's batch alone. Cost: a copy of the model and a forward pass; no exchange.
    """
    if (found := _fault(images)) is not None:
        return NonFinite(step=step, place=NonFinitePlace.INPUT, tensor="", detail=found)
    search = _Search(lone_copy(model))
    if len(images) == 1:  # twice the same image has the same mean and biased variance, and torch wants two
        images, labels = images.repeat_interleave(2, dim=0), labels.repeat_interleave(2)
    with torch.no_grad(), autocast():
        logits = search.model(images)
    if search.found is not None:
        place, tensor, detail = search.found
        return NonFinite(step=step, place=place, tensor=tensor, detail=detail)
    loss_dtype = images.dtype
    if (found := _fault(F.cross_entropy(logits.to(loss_dtype), labels))) is not None:
        return NonFinite(step=step, place=NonFinitePlace.LOSS, tensor="", detail=found)
    return NonFinite(
        step=step,
        place=NonFinitePlace.OTHER_RANK,
        tensor="",
        detail="this rank's images, and all that it makes of them alone, are finite",
    )


class _Search:
    """Listens to every module of ``model``, which is its own, and keeps the first thing that is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: tuple[NonFinitePlace, str, str] | None = None
        self._paths = {module: path for path, module in model.named_modules()}
        for module in self._paths:
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, _args: object) -> None:
        for place, name, tensor in _tensors_of(module):
            self._look(place, ".".join(filter(None, [self._paths[module], name])), tensor)

    def _after(self, module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            self._look(NonFinitePlace.ACTIVATION, self._paths[module], output)

    def _look(self, place: NonFinitePlace, path: str, tensor: Tensor) -> None:
        if self.found is None and (detail := _fault(tensor)) is not None:
            self.found = place, path, detail


def _tensors_of(module: nn.Module) -> Iterator[tuple[NonFinitePlace, str, Tensor]]:
    """What ``module`` itself computes with, its children apart."""
    for name, parameter in module.named_parameters(recurse=False):
        yield NonFinitePlace.PARAMETER, name, parameter
    if isinstance(module, _BatchNorm) and not module.training:
        for name, buffer in module.named_buffers(recurse=False):
            yield NonFinitePlace.RUNNING_STATISTICS, name, buffer


def _fault(tensor: Tensor) -> str | None:
    """How many values are not finite, in words; None if all are."""
    finite = tensor.isfinite()
    if finite.all():
        return None
    num_nan = int(tensor.isnan().sum())
    num_infinite = int((~finite).sum()) - num_nan
    parts = [f"{num_nan} NaN"] * bool(num_nan) + [f"{num_infinite} infinite"] * bool(num_infinite)
    return f"{' and '.join(parts)} of {tensor.numel()} values"
