"""Ranks against each other: whether one sees other data than the rest, and whether all hold the same buffers.

In one step all ranks have the same weights, so what differs between their batches is the data and chance, however fast
the weights move. Chance is told from data by how images differ within each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from syncbn.drift.sampling import ImageMoments


@dataclass(frozen=True, eq=False)
class Difference:
    """Each rank less all others. All ``(R, C)`` in float64; NaN where nothing was to be compared."""

    z: Tensor
    """In standard errors; under equal data about Student's t with `degrees` of freedom."""
    degrees: Tensor
    size: Tensor
    """In standard deviations for the mean, in nats of log variance for the variance; signed as `z`."""


@dataclass(frozen=True, eq=False)
class RankContrast:
    """Sums over sampled steps of how each rank's batch differs from the others' in the same step.

    In a step with ``n`` images on the rank and ``h`` on the others the difference of means has variance
    ``s2 (1/n + 1/h)``, with ``s2`` pooled over what images differ within each rank. Steps are weighted by
    ``1 / (1/n + 1/h)``, and z is a ratio of sums over steps: with two images a rank, the noise of a single step is too
    badly known to divide by.

    Shape: ``sums`` is ``(4, 2, R, C)``, the second dimension mean and variance; ``weight`` is ``(R,)``. Float64.
    """

    num_steps: int
    weight: Tensor
    sums: Tensor
    """Differences, their variance, the square of that over its degrees of freedom, pooled ``v``, all weighted."""

    @classmethod
    def empty(cls, num_ranks: int, num_channels: int, device: torch.device | str | None = None) -> RankContrast:
        """The contrast of no steps."""
        weight = torch.zeros(num_ranks, dtype=torch.float64, device=device)
        return cls(0, weight, weight.new_zeros(4, 2, num_ranks, num_channels))

    def add(self, ranks: Sequence[ImageMoments]) -> RankContrast:
        """With one step more, of which ``ranks`` are the moments by rank. A rank without images has no part in it."""
        weight, sums = _step(ranks)
        return RankContrast(self.num_steps + 1, self.weight + weight, self.sums + sums)

    def merge(self, other: RankContrast) -> RankContrast:
        """Of both together, of disjoint steps."""
        return RankContrast(self.num_steps + other.num_steps, self.weight + other.weight, self.sums + other.sums)

    @property
    def mean(self) -> Difference:
        """Of the batch means, in standard deviations of the values."""
        difference, noise, _, var = self.sums[:, 0]
        return Difference(difference / noise.sqrt(), self._degrees(0), difference / (self._total * var).sqrt())

    @property
    def variance(self) -> Difference:
        """Of the mean squared deviation from the step's mean over all ranks.

        A rank whose mean is off by ``d`` standard deviations has about ``d^2`` more of it too: look at `mean` first.
        """
        difference, noise, _, var = self.sums[:, 1]
        return Difference(difference / noise.sqrt(), self._degrees(1), difference / var)

    @property
    def _total(self) -> Tensor:
        return self.weight.unsqueeze(1)

    def _degrees(self, quantity: int) -> Tensor:
        """Satterthwaite 1946, eq. 17, with ``f + 2`` for ``f`` because the variances are themselves estimates."""
        noise, squared = self.sums[1, quantity], self.sums[2, quantity]
        return noise.square() / squared


def _step(ranks: Sequence[ImageMoments]) -> tuple[Tensor, Tensor]:
    pooled = reduce(ImageMoments.merge, ranks)
    images = torch.stack([rank.num_images for rank in ranks])  # (R,)
    others = pooled.num_images - images
    weight = torch.where((images > 0) & (others > 0), images * others / pooled.num_images, 0.0)
    degrees = (images - 1).clamp(min=0).sum()
    weight = torch.where(degrees > 0, weight, 0.0)
    squares, deviations = zip(*(rank.spread_about(pooled.mean) for rank in ranks), strict=True)
    positions = pooled.positions.square()
    rows = []
    for values, within in (
        (torch.stack([rank.mean for rank in ranks]), torch.stack([rank.sums[1] for rank in ranks])),
        (torch.stack(squares), torch.stack(deviations)),
    ):
        var = within.sum(0) / positions / degrees.clamp(min=1)  # (C,)
        rows.append(_weighted(values, var, pooled.var, weight, ranks, degrees))
    return weight, torch.stack(rows, 1)


def _weighted(
    values: Tensor, noise: Tensor, var: Tensor, weight: Tensor, ranks: Sequence[ImageMoments], degrees: Tensor
) -> Tensor:
    """``(4, R, C)``."""
    counts = torch.stack([rank.num_values for rank in ranks]).unsqueeze(1)
    total = (values * counts).sum(0) - values * counts
    others = total / (counts.sum() - counts).clamp(min=1)
    w = weight.unsqueeze(1)
    noise = w * noise
    return torch.stack([w * (values - others), noise, noise.square() / (degrees + 2), w * var])
