"""Says which channels are dead, collapsed, exploding or muted for good."""

import math
from collections.abc import Sequence
from itertools import takewhile

from service.jobs import BatchNormSample, ChannelState, LayerChannels, LayerSample
from service.reports.record import SampledLayers

NUM_SAMPLES = 3
"""A state counts if this many samples in a row show it, or as many as there are."""
NUM_VALUES = 100
"""Independent outputs of which none was above 0, so that a channel that answers to 3 % of images is not called dead."""
MOST_SAMPLES = 100


def list_channels(samples: Sequence[SampledLayers]) -> tuple[LayerChannels, ...]:
    """What the last samples of the last attempt agree on, layers in order of execution.

    Dead channels must be so in at least three samples, and in as many as hold 100 outputs, counted as independent by
    the design effect; with fewer, nothing is said of them. Cost: O(layers), of at most 100 samples.
    """
    last = last_samples(samples)
    if not last:
        return ()
    found = (_of_layer(layer, last, state) for layer in last[0].layers for state in ChannelState)
    return tuple(channels for channels in found if channels is not None and channels.num_in_state)


def last_samples(samples: Sequence[SampledLayers]) -> tuple[BatchNormSample, ...]:
    """At most the last hundred samples of the last attempt, the newest first."""
    newest_first = samples[: -MOST_SAMPLES - 1 : -1]
    same = takewhile(lambda taken: taken.attempt == newest_first[0].attempt, newest_first)
    return tuple(taken.sample for taken in same)


def _of_layer(layer: LayerSample, newest_first: Sequence[BatchNormSample], state: ChannelState) -> LayerChannels | None:
    seen = [other for sample in newest_first for other in sample.layers if other.layer == layer.layer]
    num = NUM_SAMPLES if state is not ChannelState.DEAD else _num_for_values(seen)
    if num is None:
        return None
    seen = seen[:num]
    shared = set(_channels(layer, state)).intersection(*(_channels(other, state) for other in seen))
    complete = all(len(_channels(other, state)) == _count(other, state) for other in seen)
    return LayerChannels(
        layer=layer.layer,
        state=state,
        num_channels=layer.num_channels,
        num_in_state=len(shared) if complete else min(_count(other, state) for other in seen),
        channels=tuple(sorted(shared)),
    )


def _num_for_values(newest_first: Sequence[LayerSample]) -> int | None:
    """How many of the samples hold enough outputs; None if all of them do not."""
    values = 0.0
    for number, layer in enumerate(newest_first, start=1):
        values += layer.num_images * layer.positions_per_image / _design_effect(layer)
        if number >= NUM_SAMPLES and values >= NUM_VALUES:
            return number
    return None


def _design_effect(layer: LayerSample) -> float:
    """Between 1 and the number of positions, which it is taken for where it is not known."""
    effect, most = layer.design_effect, float(max(layer.positions_per_image, 1))
    return min(max(effect, 1.0), most) if math.isfinite(effect) else most


def _channels(layer: LayerSample, state: ChannelState) -> tuple[int, ...]:
    channels: tuple[int, ...] = getattr(layer, state)
    return channels


def _count(layer: LayerSample, state: ChannelState) -> int:
    return int(getattr(layer, f"num_{state}"))
