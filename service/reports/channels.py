"""Says which channels are dead, collapsed, exploding or muted for good."""

from collections.abc import Sequence

from service.jobs import BatchNormSample, ChannelState, LayerChannels, LayerSample
from service.reports.record import SampledLayers

NUM_SAMPLES = 3
"""A state counts if this many samples in a row show it, or as many as there are: a single small batch shows a channel
as dead that is not."""


def list_channels(samples: Sequence[SampledLayers]) -> tuple[LayerChannels, ...]:
    """What the last samples of the last attempt agree on, layers in order of execution. Cost: O(layers)."""
    last = last_samples(samples)
    if not last:
        return ()
    found = (_of_layer(layer, last, state) for layer in last[-1].layers for state in ChannelState)
    return tuple(channels for channels in found if channels.num_in_state)


def last_samples(samples: Sequence[SampledLayers]) -> tuple[BatchNormSample, ...]:
    """The last three samples of the last attempt, or as many as there are."""
    tail = samples[-NUM_SAMPLES:]
    return tuple(taken.sample for taken in tail if taken.attempt == tail[-1].attempt)


def _of_layer(layer: LayerSample, samples: Sequence[BatchNormSample], state: ChannelState) -> LayerChannels:
    seen = [other for sample in samples for other in sample.layers if other.layer == layer.layer]
    shared = set(_channels(layer, state)).intersection(*(_channels(other, state) for other in seen))
    complete = all(len(_channels(other, state)) == _count(other, state) for other in seen)
    return LayerChannels(
        layer=layer.layer,
        state=state,
        num_channels=layer.num_channels,
        num_in_state=len(shared) if complete else min(_count(other, state) for other in seen),
        channels=tuple(sorted(shared)),
    )


def _channels(layer: LayerSample, state: ChannelState) -> tuple[int, ...]:
    channels: tuple[int, ...] = getattr(layer, state)
    return channels


def _count(layer: LayerSample, state: ChannelState) -> int:
    return int(getattr(layer, f"num_{state}"))
