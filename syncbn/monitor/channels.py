"""Channels that carry nothing, or too much, by what one training step shows of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.layout import Layout

COLLAPSED_SHARE = 1e-6
COLLAPSED_EPS = 10.0
MUTED_WEIGHT = 1e-3
DEAD_SHARE = 1e-3
EXPLODING_FACTOR = 1e3


@dataclass(frozen=True, eq=False)
class ChannelStates:
    """Which channels of all layers are in which state; boolean, ``(C,)`` each.

    ``exploding``: not finite, or their root mean square is beyond a thousand times what it once was.
    ``collapsed``: the variance is below a millionth of the median over the layer's channels, those that explode left
        out, or below ten times its ``eps``, so that the layer puts out hardly anything but its bias.
    ``muted``: the weight is below a thousandth.
    ``dead``: none of the above, and at most one output in a thousand is above zero: a ReLU behind it would pass
        nothing on. The layer does not know what is behind it; in front of anything else this need not be a fault.
    """

    dead: Tensor
    collapsed: Tensor
    exploding: Tensor
    muted: Tensor


def channel_states(
    layout: Layout, moments: ImageMoments, weight_size: Tensor, num_positive: Tensor, eps: Tensor, once: Tensor
) -> ChannelStates:
    """The states of layers fed ``moments``, whose root mean square was ``once`` (NaN: not known); all ``(C,)``."""
    var, size = moments.var, root_mean_square(moments)
    exploding = ~size.isfinite() | (size > EXPLODING_FACTOR * torch.maximum(once, eps.sqrt()))
    # NaN if all channels of a layer explode, which compares with nothing.
    medians = layout.by_layer(torch.where(exploding, torch.nan, var), torch.nan).nanmedian(-1).values
    collapsed = ~exploding & ((var < COLLAPSED_SHARE * medians[layout.layer_of]) | (var < COLLAPSED_EPS * eps))
    muted = ~exploding & ~collapsed & (weight_size < MUTED_WEIGHT)
    dead = ~(exploding | collapsed | muted) & (num_positive <= DEAD_SHARE * moments.num_values)
    return ChannelStates(dead, collapsed, exploding, muted)


def root_mean_square(moments: ImageMoments) -> Tensor:
    """Of the values, ``(C,)``."""
    return torch.sqrt(moments.var + moments.mean.square())
