"""Listening: what the layers of this rank are fed in one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from syncbn.drift.image_sums import ImageSums
from syncbn.drift.sampling import ImageMoments
from syncbn.layers import input_of_call
from syncbn.monitor.heard import Heard, digests_of
from syncbn.monitor.layout import Layout
from syncbn.monitor.recording import Recording
from syncbn.recomputation import is_recomputing


class Listening:
    """Hooks on ``layers``, at least one, from when it is made until `stop`; they read, and write nothing.

    What does not count is passed by: a layer in evaluation mode, a recomputation of activation checkpointing and
    compiled code, of which only the updates of running statistics are told. Nothing waits for a device.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        counts = zip(layers.values(), _counts_of_batches(list(layers.values())), strict=True)
        self._recordings = {layer: Recording(layer, num_batches) for layer, num_batches in counts}
        self._num_heard = 0
        self._handles: list[RemovableHandle] = []
        for layer in self._recordings:
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after))

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def moments(self) -> list[ImageMoments]:
        """Of what each layer was fed until now, in the order of layers as given."""
        return [ImageMoments.of_layer(recording.sums) for recording in self._recordings.values()]

    def heard(self, layout: Layout, num_sharing: Sequence[int]) -> Heard:
        """What was heard until now, in the order of layers as given, which must be that of ``layout``.

        ``num_sharing`` is passed on, see `Heard`.
        """
        layers = list(self._recordings.values())
        device = layers[0].running_mean_now.device
        layer_of, starts = (places.to(device, non_blocking=True) for places in (layout.layer_of, layout.starts))
        moments = ImageMoments.of_sums(ImageSums.side_by_side([layer.sums for layer in layers]))
        own = [[layer.num_calls for layer in layers], [layer.place for layer in layers], num_sharing]
        buffers = [layer.running_mean_now for layer in layers] + [layer.running_var_now for layer in layers]
        by_layer = [
            torch.tensor(own, dtype=torch.float64).to(device, non_blocking=True),
            torch.stack([torch.stack([layer.num_batches, layer.num_updates]) for layer in layers], 1).double(),
            digests_of(buffers, layer_of, len(layers)).unsqueeze(0),
            torch.stack([moments.num_images, moments.num_values, moments.num_squared])[:, starts],
        ]
        by_channel = [
            torch.cat([layer.running_mean for layer in layers]).double(),
            torch.cat([layer.weight for layer in layers]).double().abs(),
            torch.cat([layer.num_positive for layer in layers]).double(),
            moments.mean,
        ]
        return Heard(torch.cat(by_layer), torch.cat([torch.stack(by_channel), moments.sums]))

    def _before(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _counts(layer):
            return
        recording = self._recordings[layer]
        if recording.num_calls == 0:
            recording.begin(self._num_heard)
            self._num_heard += 1
        recording.add_input(*input_of_call(args, kwargs))

    def _after(self, layer: _BatchNorm, _: Any, output: Tensor) -> None:
        if _counts(layer):
            self._recordings[layer].add_output(output)


def _counts_of_batches(layers: Sequence[_BatchNorm]) -> list[Tensor | None]:
    """How many each layer has tracked, ``()``, now and for good; None if it counts none. One copy for all."""
    counters = [layer.num_batches_tracked for layer in layers]
    known = [counter for counter in counters if counter is not None]
    copies = iter(torch.stack(known)) if known else iter(())
    return [None if counter is None else next(copies) for counter in counters]


def _counts(layer: _BatchNorm) -> bool:
    # Without its buffers it is lent to a pass over a population: no step, in whatever mode it was forgotten.
    is_lent = layer.running_mean is None
    return layer.training and not is_lent and not torch.compiler.is_compiling() and not is_recomputing()
