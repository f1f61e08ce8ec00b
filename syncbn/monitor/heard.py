"""Heard: what the layers of a model were fed in one training step, as a vector that ranks can exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.layout import Layout

_NUM_BY_LAYER = 9
_NUM_BY_CHANNEL = 10
_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; what matters is that it is odd and has bits everywhere
_DROPPED_BITS = 11  # every integer of the other 53 is a double


@dataclass(frozen=True, eq=False)
class Heard:
    """Of ``L`` layers with ``C`` channels in a row; float64 on one device. Of several ranks with ``R`` in front.

    Shape: ``by_layer`` is ``(9, L)``: the six of `num_calls` to `digest`, and the counts of `moments`. ``by_channel``
        is ``(10, C)``: the three of `running_mean` to `num_positive`, and mean and sums of `moments`. Of a layer that
        did not run all but the buffers are zero, and the weights one.
    """

    by_layer: Tensor
    by_channel: Tensor

    @property
    def num_calls(self) -> Tensor:
        """By layer."""
        return self.by_layer[..., 0, :]

    @property
    def place(self) -> Tensor:
        """By layer: in the order in which layers first ran."""
        return self.by_layer[..., 1, :]

    @property
    def num_sharing(self) -> Tensor:
        """By layer: how many of the compared ranks it shares its batch statistics with, this one included."""
        return self.by_layer[..., 2, :]

    @property
    def num_batches(self) -> Tensor:
        """By layer: that the running statistics had tracked before the step."""
        return self.by_layer[..., 3, :]

    @property
    def num_updates(self) -> Tensor:
        """By layer: of the running statistics in the step."""
        return self.by_layer[..., 4, :]

    @property
    def digest(self) -> Tensor:
        """By layer: of the running statistics after the step, see `digests_of`."""
        return self.by_layer[..., 5, :]

    @property
    def num_images(self) -> Tensor:
        """By layer."""
        return self.by_layer[..., 6, :]

    @property
    def running_mean(self) -> Tensor:
        """By channel: before the step."""
        return self.by_channel[..., 0, :]

    @property
    def weight_size(self) -> Tensor:
        """By channel: of the layer's weight, without sign."""
        return self.by_channel[..., 1, :]

    @property
    def num_positive(self) -> Tensor:
        """By channel: how many outputs are above zero."""
        return self.by_channel[..., 2, :]

    def moments(self, layout: Layout) -> ImageMoments:
        """Of the inputs, with counts by channel; of ranks they are stacked."""
        num_images, num_values, num_squared = self.by_layer[..., 6:, layout.layer_of].unbind(-2)
        rows = self.by_channel[..., 3:, :].movedim(-2, 0)
        return ImageMoments(num_images, num_values, num_squared, rows[0], rows[1:])

    def pack(self) -> Tensor:
        """One vector of ``9L + 10C`` doubles, to be gathered."""
        return torch.cat([self.by_layer.flatten(), self.by_channel.flatten()])

    @classmethod
    def unpack(cls, rows: Tensor, num_layers: int) -> Heard:
        """Of ``R`` ranks, from what they packed, ``(R, 9L + 10C)``."""
        by_layer, by_channel = rows.tensor_split([_NUM_BY_LAYER * num_layers], dim=1)
        by_layer = by_layer.reshape(len(rows), _NUM_BY_LAYER, num_layers)
        return cls(by_layer, by_channel.reshape(len(rows), _NUM_BY_CHANNEL, -1))


def digests_of(buffers: Sequence[Tensor], layer_of: Tensor, num_layers: int) -> Tensor:
    """A number for the bits of each layer's ``buffers``, ``(L,)``; others have the same by a chance of about 1e-16.

    The sum of the bit patterns, each times an odd number of its own, modulo ``2 ** 64``; of that the upper 53 bits.
    ``buffers`` are those of one kind, by layer, then those of the next; ``layer_of`` is that of a kind's ``(C,)``.
    """
    values = torch.cat(list(buffers))  # of mixed types the widest, which holds the others exactly
    bits = values.view(_INTEGERS[values.element_size()]).long()
    factors = (2 * torch.arange(bits.numel(), device=bits.device) + 1) * _MULTIPLIER
    kinds = layer_of.repeat(bits.numel() // max(1, layer_of.numel()))
    sums = torch.zeros(num_layers, dtype=torch.int64, device=bits.device).index_add_(0, kinds, bits * factors)
    return (sums >> _DROPPED_BITS).double()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
