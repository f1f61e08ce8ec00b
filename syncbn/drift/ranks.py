"""Whether one rank sees other data than the rest.

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
from syncbn.drift.significance import two_sided_p


@dataclass(frozen=True, eq=False)
class Difference:
    """Each rank less all others. All ``(R, C)`` in float64; NaN where nothing was to be compared."""

    z: Tensor
    """In standard errors; under equal data about Student's t with `degrees` of freedom."""
    degrees: Tensor
    size: Tensor
    """In standard deviations for the mean, in nats of log variance for the variance; signed as `z`."""

    @property
    def p(self) -> Tensor:
        """Probability of as large a ``|z|`` under equal data, two-sided, of each by itself."""
        return two_sided_p(self.z, self.degrees)


@dataclass(frozen=True, eq=False)
class RankContrast:
    """Sums over sampled steps of how each rank's batch differs from the others' in the same step.

    In a step with ``n`` images on the rank and ``h`` on the others the difference of means has variance
    ``s2 (1/n + 1/h)``, with ``s2`` pooled over what images differ within each rank. Steps are weighted by
    ``1 / (1/n + 1/h)``, and z is a ratio of sums over steps: with two images a rank, the noise of a single step is too
    badly known to divide by. Where no rank ever had two images, the noise is what differences vary from step to step.

    Shape: ``weights`` is ``(3, R)``; ``sums`` is ``(5, 2, R, C)``, the second dimension mean and variance. Float64.
    """

    num_steps: int
    weights: Tensor
    """By rank: weight of all steps, weight of those with known noise, number of steps."""
    sums: Tensor
    """Differences, their variance, the square of that over its degrees of freedom, the scale, squared differences."""

    @classmethod
    def empty(cls, num_ranks: int, num_channels: int, device: torch.device | str | None = None) -> RankContrast:
        """The contrast of no steps."""
        weights = torch.zeros(3, num_ranks, dtype=torch.float64, device=device)
        return cls(0, weights, weights.new_zeros(5, 2, num_ranks, num_channels))

    def add(self, ranks: Sequence[ImageMoments]) -> RankContrast:
        """With one step more, of which ``ranks`` are the moments by rank. A rank without images has no part in it."""
        return self.merge(_step(ranks))

    def merge(self, other: RankContrast) -> RankContrast:
        """Of both together, of disjoint steps."""
        return RankContrast(self.num_steps + other.num_steps, self.weights + other.weights, self.sums + other.sums)

    @property
    def mean(self) -> Difference:
        """Of the batch means, in standard deviations of the values."""
        difference, scale = self.sums[0, 0], self.sums[3, 0]
        z, degrees = self._in_standard_errors(0)
        return Difference(z, degrees, difference / (self.weights[0].unsqueeze(1) * scale).sqrt())

    @property
    def variance(self) -> Difference:
        """Of the mean squared deviation from the step's mean over all ranks.

        A rank whose mean is off by ``d`` standard deviations has up to ``d^2`` more of it too: look at `mean` first.
        """
        z, degrees = self._in_standard_errors(1)
        excess = self.sums[0, 1] / self.sums[3, 1]
        return Difference(z * _least_skewed(excess), degrees, torch.log1p(excess))

    def _in_standard_errors(self, quantity: int) -> tuple[Tensor, Tensor]:
        """In standard errors, with degrees of freedom (Satterthwaite 1946).

        As the variances in it are estimates themselves, they come out too small, by half at most. That is left as it
        is: it pays for values that are not normally distributed.
        """
        difference, noise, squared_noise, _, squares = self.sums[:, quantity]
        total, known, num_steps = self.weights.unsqueeze(2)
        is_known = known > 0
        between = (squares - difference.square() / total).clamp(min=0) / (num_steps - 1).clamp(min=1)
        variance = torch.where(is_known, noise / known, between) * total
        degrees = torch.where(is_known, noise.square() / squared_noise, num_steps - 1)
        is_comparable = (total > 0) & (degrees > 0)
        return torch.where(is_comparable, difference / variance.sqrt(), torch.nan), degrees


def _step(ranks: Sequence[ImageMoments]) -> RankContrast:
    """The contrast of one step."""
    pooled = reduce(ImageMoments.merge, ranks)
    images = torch.stack([rank.num_images for rank in ranks])  # (R,)
    weight = images * (pooled.num_images - images) / pooled.num_images.clamp(min=1)
    degrees = (images - 1).clamp(min=0).sum()
    weights = torch.stack([weight, weight * (degrees > 0), (weight > 0).double()])
    means = torch.stack([rank.mean for rank in ranks])
    mean_noise = torch.stack([rank.sums[1] for rank in ranks]).sum(0)
    spreads = [rank.spread_about(pooled.mean) for rank in ranks]
    squares = torch.stack([square for square, _ in spreads])
    square_noise = torch.stack([noise for _, noise in spreads]).sum(0)

    counts = torch.stack([rank.num_values for rank in ranks])
    other_squares = _of_others(squares, counts)
    per_degree = 1 / (pooled.positions.square() * degrees.clamp(min=1))
    rows = [
        _sums(means - _of_others(means, counts), mean_noise * per_degree, degrees, pooled.var, weights),
        _sums(squares - other_squares, square_noise * per_degree, degrees, other_squares, weights),
    ]
    return RankContrast(1, weights, torch.stack(rows, 1))


def _least_skewed(excess: Tensor) -> Tensor:
    """What z of a mean square is to be multiplied with, if it is ``excess`` more than the others', relatively.

    A mean square of few images is skewed to the right, and its cube root hardly (Wilson and Hilferty 1931): against
    many images of others, z of the cube roots is the better one. Against as few, z of the squares is. The smaller of
    both is safe in either case.
    """
    slope = 3 * ((1 + excess).clamp(min=0).pow(1 / 3) - 1) / excess
    return torch.where(excess > 0, slope, 1.0)


def _of_others(values: Tensor, counts: Tensor) -> Tensor:
    """For each rank the mean over the values of all others, ``(R, C)``, from ``(R, C)`` and ``(R,)``."""
    weighted, counts = values * counts.unsqueeze(1), counts.unsqueeze(1)
    return (weighted.sum(0) - weighted) / (counts.sum() - counts).clamp(min=1)


def _sums(difference: Tensor, variance: Tensor, degrees: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """``(5, R, C)``, see `RankContrast.sums`."""
    weight, known = weights[0].unsqueeze(1), weights[1].unsqueeze(1)
    noise = known * variance
    squared_noise = noise.square() / degrees.clamp(min=1)
    return torch.stack([weight * difference, noise, squared_noise, weight * scale, weight * difference.square()])
