"""Where channels of several layers stand in a row, so that one operation reckons for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """``L`` layers with ``C`` channels in all; tensors are on the CPU.

    ``sizes``: channels by path, in their order. ``layer_of`` and ``channel_of``: of each channel in the row its layer,
    and its number in there; ``(C,)``. ``starts``: the first channel of each layer, ``(L,)``.
    """

    sizes: Mapping[str, int]
    layer_of: Tensor
    channel_of: Tensor
    starts: Tensor

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Layout:
        """Of layers with so many channels, in this order."""
        counts = torch.tensor(list(sizes.values()), dtype=torch.int64)
        starts = counts.cumsum(0) - counts
        layer_of = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(dict(sizes), layer_of, torch.arange(len(layer_of)) - starts[layer_of], starts)

    @property
    def num_channels(self) -> int:
        """``C``."""
        return len(self.layer_of)

    def by_layer(self, values: Tensor, fill: float | bool) -> Tensor:
        """``(*, C)`` as ``(*, L, most channels)``, with ``fill`` behind layers that have fewer."""
        shape = (*values.shape[:-1], len(self.sizes), max(self.sizes.values()))
        table = values.new_full(shape, fill)
        table[..., self.layer_of, self.channel_of] = values
        return table

    def slice_of(self, layer: int) -> slice:
        """Where the channels of the layer with this number are."""
        start = int(self.starts[layer])
        return slice(start, start + list(self.sizes.values())[layer])

    def places_of(self, paths: Sequence[str]) -> Tensor:
        """Where in the row the channels of these layers are, one layer after the other."""
        numbers = {path: number for number, path in enumerate(self.sizes)}
        parts = [torch.arange(self.num_channels)[self.slice_of(numbers[path])] for path in paths]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def name(self, place: int) -> tuple[str, int]:
        """Path of the layer and number of the channel in it, of the channel at ``place``."""
        return list(self.sizes)[int(self.layer_of[place])], int(self.channel_of[place])
