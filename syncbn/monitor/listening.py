"""Listening: what each layer of this rank is fed in one training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.heard import Heard, digest_of
from syncbn.recomputation import is_recomputing


class Listening:
    """Hooks on ``layers`` from when it is made until `stop`; they read, and write nothing.

    What does not count is passed by: a layer in evaluation mode, a recomputation of activation checkpointing and
    compiled code. Nothing waits for a device.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._recordings = {layer: _Recording(layer) for layer in layers.values()}
        self._num_heard = 0
        self._handles: list[RemovableHandle] = []
        for layer in self._recordings:
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after))

    def stop(self) -> list[Heard]:
        """Take the hooks off and tell what was heard, in the order of layers as given."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return [recording.result() for recording in self._recordings.values()]

    def _before(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _counts(layer):
            return
        recording = self._recordings[layer]
        if recording.num_calls == 0:
            recording.begin(self._num_heard)
            self._num_heard += 1
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        recording.add_input(args[0] if args else kwargs["input"], mask)

    def _after(self, layer: _BatchNorm, _: Any, output: Tensor) -> None:
        if _counts(layer):
            self._recordings[layer].add_output(output)


class _Recording:
    """Of one layer, which may be called several times in the step."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.num_calls = 0
        self._layer = layer
        self._place = 0
        self._running_mean = self._running_mean_now().to(torch.float64, copy=True)
        self._num_batches = self._counted()
        self._weight_size = torch.ones_like(self._running_mean)
        self._num_positive = torch.zeros_like(self._running_mean)
        self._moments = ImageMoments.empty(layer.num_features, self._running_mean.device)

    def begin(self, place: int) -> None:
        """Before the first call, the ``place``-th of a layer: what it will be compared with."""
        self._place = place
        self._running_mean = self._running_mean_now().to(torch.float64, copy=True)
        self._num_batches = self._counted()
        if self._layer.weight is not None:
            # A copy, and at once: the optimizer moves it, and a sharded one is whole only in the forward.
            self._weight_size = self._layer.weight.detach().double().abs()

    def add_input(self, input: Tensor, mask: Tensor | None) -> None:
        self.num_calls += 1
        with torch.no_grad():
            moments = ImageMoments.of(input, mask)
            self._moments = moments if self.num_calls == 1 else self._moments.merge(moments)

    def add_output(self, output: Tensor) -> None:
        with torch.no_grad():
            self._num_positive += (output.detach() > 0).transpose(0, 1).flatten(1).sum(1)

    def result(self) -> Heard:
        uncounted = self._layer.num_batches_tracked is None
        num_calls = self._scalar(self.num_calls)
        return Heard(
            num_calls=num_calls,
            place=self._scalar(self._place),
            num_batches=self._num_batches,
            num_updates=num_calls if uncounted else self._counted() - self._num_batches,
            digest=digest_of(torch.cat([self._running_mean_now(), self._running_var_now()])),
            running_mean=self._running_mean,
            weight_size=self._weight_size,
            num_positive=self._num_positive,
            moments=self._moments,
        )

    def _counted(self) -> Tensor:
        counter = self._layer.num_batches_tracked
        return self._scalar(0) if counter is None else counter.detach().to(torch.float64, copy=True)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._running_mean_now().device)

    def _running_mean_now(self) -> Tensor:
        assert self._layer.running_mean is not None
        return self._layer.running_mean.detach()

    def _running_var_now(self) -> Tensor:
        assert self._layer.running_var is not None
        return self._layer.running_var.detach()


def _counts(layer: nn.Module) -> bool:
    return layer.training and not torch.compiler.is_compiling() and not is_recomputing()
