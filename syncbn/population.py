"""Population statistics: what the running statistics estimate, computed for the weights as they are now.

Ioffe and Szegedy 2015, Algorithm 2, lines 8 to 12; the estimators are in `syncbn.estimators`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.agreement import Exchange
from syncbn.estimators import Estimate, Estimator, estimate_for
from syncbn.exchange import peers, sum_over_ranks
from syncbn.freezing import is_frozen
from syncbn.kernels.aten import local_moments
from syncbn.layers import input_of_call, tracked_layers, unwrapped
from syncbn.moments import BatchMoments


def without_targets(batch: Any) -> Any:
    """The first item of a tuple or list, which is how data sets give a sample with its target; else ``batch``."""
    return batch[0] if isinstance(batch, tuple | list) else batch


@torch.no_grad()
def population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = Estimator.POOLED,
    input_of: Callable[[Any], Any] = without_targets,
    process_group: ProcessGroup | None = None,
) -> dict[str, BatchMoments]:
    """Moments of what each BatchNorm layer is fed, estimated from all ``batches`` of all ranks.

    Each batch goes through ``model(input_of(batch))`` in evaluation mode, save that every BatchNorm that keeps
    running statistics, torch's or ours, normalizes by the batch's own, as in training. That is the rank's batch: a
    layer sees what it sees in training if the batches are of the size that all ranks have together in training.
    Frozen layers (`freeze`) are measured too, but go on to normalize by what they are frozen at, as they do in
    training. Where a layer is called with a mask, what it masks does not count. Modes, buffers and counters are as
    before afterwards, whatever happens; `apply_statistics` writes the result.

    Below the first BatchNorm this is an estimate: a rank's batch has other moments than the joined one, and what
    comes out of it is fed to the next layer. One exchange allows no more; larger batches make the difference small.

    Args:
        model: of any kind; of DistributedDataParallel the module inside is called.
        batches: gone through once; may be empty on some ranks.
        estimator: what is made of the batches.
        input_of: from a batch, the argument of ``model``; by default the batch, or its first item if it is a tuple
            or list.
        process_group: whose batches count; None for the default group, if there is one.

    Returns:
        By module path, in the order in which the layers first ran (for ranks that differ, on average); the same on
        every rank. ``unbiased_var`` is the variance for evaluation. Layers that never ran are left out.
    Cost: a forward pass a batch, memory of some ``C`` doubles a layer, and ONE exchange of ``2C + 3`` doubles a layer
        (another than the pooled estimator: ``2C + 4``), all in one vector, when this rank's batches are used up.
        All ranks must call, also those without any batch.
    Raises: ValueError from torch, for a batch with a single value per channel; ValueError for a layer still lazy.
        RanksDisagree if ranks want different estimates or their layers differ in size, RanksMissing if one does not
        come, as after an error in its batches; see `ExchangeError`.
    """
    layers = tracked_layers(model)
    record = _Record(layers, estimator)
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for layer in layers.values():
            if not is_frozen(layer):
                stack.enter_context(_buffers(layer, running_mean=None, running_var=None))
        stack.enter_context(record.listening())
        for batch in batches:
            unwrapped(model)(input_of(batch))
    return record.over_ranks(peers(process_group))


@torch.no_grad()
def apply_statistics(model: nn.Module, statistics: Mapping[str, BatchMoments]) -> None:
    """Write ``statistics`` (the variance unbiased) into the running statistics of the named layers, for good.

    In place, so that whoever holds the buffers sees it; the counters of batches stay, and frozen layers keep what
    they are frozen at. No collective: where ranks pass the same, as `population_statistics` returns it, they go on
    holding the same bits.

    Raises:
        ValueError: if ``statistics`` names a layer that the model does not have, that keeps no statistics or has
            another number of channels; before anything is changed.
    """
    for path, layer in _movable_layers(model, statistics).items():
        for name, value in _as_buffers(layer, statistics[path]).items():
            buffer = layer._buffers[name]
            if buffer is not None and value is not None:
                buffer.copy_(value)


@contextmanager
def using_statistics(model: nn.Module, statistics: Mapping[str, BatchMoments]) -> Iterator[None]:
    """Inside the block, the named layers hold ``statistics`` (the variance unbiased) as their running statistics.

    Afterwards the layers have their own buffers again: the same tensors, which nothing in the block has written to,
    not even training. Layers that ``statistics`` does not name, and frozen ones, keep theirs throughout. Modes are
    the caller's: statistics only matter in evaluation mode.

    Raises:
        ValueError: if ``statistics`` names a layer that the model does not have, that keeps no statistics or has
            another number of channels; before anything is changed.
    """
    layers = _movable_layers(model, statistics)
    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(_buffers(layer, **_as_buffers(layer, statistics[path])))
        yield


def _movable_layers(model: nn.Module, statistics: Mapping[str, BatchMoments]) -> dict[str, _BatchNorm]:
    """The layers that ``statistics`` names, less those that are frozen."""
    layers = tracked_layers(model)
    unknown = sorted(statistics.keys() - layers.keys())
    if unknown:
        raise ValueError(f"no layers with running statistics at {unknown}; the model has {sorted(layers)}")
    for path, moments in statistics.items():
        if moments.mean.shape != (layers[path].num_features,):
            raise ValueError(
                f"{path or 'the model itself'} has {layers[path].num_features} channels, and its statistics "
                f"{moments.mean.numel()}; were they taken from another model?"
            )
    return {path: layers[path] for path in statistics if not is_frozen(layers[path])}


class _Record:
    """What passed through each layer on this rank: an estimate, and at which place in the order it first ran."""

    def __init__(self, layers: Mapping[str, _BatchNorm], estimator: Estimator) -> None:
        self._layers = layers
        self._estimator = estimator
        self._estimates: dict[str, Estimate] = {
            path: estimate_for(estimator, layer.num_features, layer.momentum, _device(layer))
            for path, layer in layers.items()
        }
        self._order: dict[str, int] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of every input of every layer inside the block."""
        with ExitStack() as stack:
            for path, layer in self._layers.items():
                handle = layer.register_forward_pre_hook(partial(self._note, path), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _note(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._order.setdefault(path, len(self._order))
        self._estimates[path].add(local_moments(*input_of_call(args, kwargs)))

    def over_ranks(self, process_group: ProcessGroup | None) -> dict[str, BatchMoments]:
        """The estimates over all ranks, sorted by when the layers ran; joined by ranks that saw nothing as well."""
        if not self._layers:
            return {}
        if process_group is None:
            return {path: self._estimates[path].result() for path in self._order}
        slots = [torch.cat([self._estimates[path].pack(), self._place(path)]) for path in self._layers]
        vector = torch.cat(slots)
        exchange = Exchange(f"{self._estimator} population statistics", num_values=vector.numel())
        total = sum_over_ranks(vector, process_group, exchange)
        parts = dict(zip(self._layers, torch.split(total, [slot.numel() for slot in slots]), strict=True))
        places = {path: (part[-2] / part[-1]).item() for path, part in parts.items() if part[-1] > 0}
        return {path: self._estimates[path].unpack(parts[path][:-2]) for path in sorted(places, key=places.__getitem__)}

    def _place(self, path: str) -> Tensor:
        """Place in the order, and a one to divide the ranks' sum of places by; zeros if the layer never ran."""
        ran = path in self._order
        return torch.tensor([self._order.get(path, 0), ran], dtype=torch.float64, device=_device(self._layers[path]))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module has its own mode again afterwards.

    Past ``eval``, which may do more: a frozen layer notes which mode was asked for, others merge weights.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _buffers(layer: _BatchNorm, **replacements: Tensor | None) -> Iterator[None]:
    """Other tensors, or none, in place of the named buffers; the layer has its own again afterwards."""
    originals = {name: layer._buffers[name] for name in replacements}
    layer._buffers.update(replacements)
    try:
        yield
    finally:
        layer._buffers.update(originals)


def _as_buffers(layer: _BatchNorm, moments: BatchMoments) -> dict[str, Tensor | None]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    counter = layer.num_batches_tracked
    return {
        "running_mean": moments.mean.to(layer.running_mean, copy=True),
        "running_var": moments.unbiased_var.to(layer.running_var, copy=True),
        "num_batches_tracked": None if counter is None else counter.clone(),
    }


def _device(layer: _BatchNorm) -> torch.device:
    assert layer.running_mean is not None
    return layer.running_mean.device
