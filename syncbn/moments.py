"""BatchMoments: how many values each channel saw, their mean and their variance; float64, so that merging is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BatchMoments:
    """Count, mean and biased variance of a batch, per channel.

    Shape: ``count`` is ``()``, ``mean`` and ``var`` are ``(C,)``; all float64 on one device.
    Units: ``mean`` as the values, ``var`` squared and divided by ``count`` (not ``count - 1``).
    A count of 0 has mean and variance 0 and is neutral in every merge. Nothing here waits for a GPU.
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    @classmethod
    def empty(cls, num_channels: int, device: torch.device | str | None = None) -> BatchMoments:
        """The moments of no values at all."""
        zeros = torch.zeros(2 * num_channels + 1, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1 : num_channels + 1], zeros[num_channels + 1 :])

    @property
    def unbiased_var(self) -> Tensor:
        """The variance with Bessel's correction, ``(C,)``; the biased one where it rests on fewer than two values."""
        return self.var * (self.count / (self.count - 1).clamp(min=1))

    def pack(self) -> Tensor:
        """One vector ``[n * mean, n * (var + mean^2), n]`` of ``2C + 1`` doubles; vectors of disjoint batches add up.

        The sum of squares costs digits where the mean is far from zero: the variance that `unpack` returns is good
        to about ``1e-16 * (mean / std)^2``, relatively.
        """
        squares = torch.addcmul(self.var, self.mean, self.mean)
        return torch.cat([self.mean * self.count, squares * self.count, self.count.view(1)])

    @classmethod
    def unpack(cls, vector: Tensor) -> BatchMoments:
        """Inverse of `pack`, also for a sum of packed vectors."""
        count = vector[-1]
        mean, mean_square = (vector[:-1] / count.clamp(min=1)).chunk(2)
        return cls(count, mean, torch.addcmul(mean_square, mean, mean, value=-1).clamp_(min=0))

    def merge(self, other: BatchMoments) -> BatchMoments:
        """The moments of both batches together, without loss (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        within = self.var * (1 - share) + other.var * share
        return BatchMoments(count, self.mean + delta * share, within + delta.square() * (share * (1 - share)))
