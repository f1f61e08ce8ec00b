"""Heard: what one layer was fed on one rank in one training step, as a vector that ranks can exchange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.sampling import ImageMoments

_NUM_SCALARS = 5
_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator; what matters is that it is odd and has bits everywhere
_DROPPED_BITS = 11  # every integer of the other 53 is a double


@dataclass(frozen=True, eq=False)
class Heard:
    """All float64 on one device, and all zero or one where the layer did not run.

    Shape: the first five are ``()``, those per channel ``(C,)``.
    """

    num_calls: Tensor
    place: Tensor
    """In the order in which layers first ran."""
    num_batches: Tensor
    """That the running statistics had tracked before the step."""
    num_updates: Tensor
    """Of the running statistics in the step."""
    digest: Tensor
    """Of the running statistics after the step, see `digest_of`."""
    running_mean: Tensor
    """Before the step."""
    weight_size: Tensor
    """Of the layer's weight, without sign."""
    num_positive: Tensor
    """How many outputs are above zero."""
    moments: ImageMoments
    """Of the input."""

    @staticmethod
    def num_values(num_channels: int) -> int:
        """Doubles of `pack`: ``10C + 8``."""
        return _NUM_SCALARS + 3 * num_channels + 7 * num_channels + 3

    def pack(self) -> Tensor:
        """One vector, to be gathered."""
        scalars = torch.stack([self.num_calls, self.place, self.num_batches, self.num_updates, self.digest])
        return torch.cat([scalars, self.running_mean, self.weight_size, self.num_positive, self.moments.pack()])

    @classmethod
    def unpack(cls, vector: Tensor) -> Heard:
        """Inverse of `pack`."""
        num_channels = (vector.numel() - _NUM_SCALARS - 3) // 10
        sizes = [_NUM_SCALARS, num_channels, num_channels, num_channels, 7 * num_channels + 3]
        scalars, running_mean, weight_size, num_positive, moments = torch.split(vector, sizes)
        calls, place, batches, updates, digest = scalars.unbind()
        unpacked = ImageMoments.unpack(moments)
        return cls(calls, place, batches, updates, digest, running_mean, weight_size, num_positive, unpacked)


def digest_of(values: Tensor) -> Tensor:
    """A number ``()`` for the bits of ``values``; others have the same by a chance of about 1e-16. No device waits.

    The sum of the bit patterns, each times an odd number of its own, modulo ``2 ** 64``; of that the upper 53 bits.
    """
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).flatten().long()
    factors = (2 * torch.arange(bits.numel(), device=bits.device) + 1) * _MULTIPLIER
    return ((bits * factors).sum() >> _DROPPED_BITS).double()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
