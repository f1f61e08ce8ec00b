"""Whether one rank sees other data than the rest.

In one step all ranks have the same weights, so what differs between their batches is the data and chance, however fast
the weights move. Chance is told from data by how images differ within each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    Shape: ``weights`` is ``(3, R, 1)``, or ``(3, R, C)`` where channels of several layers stand in a row; ``sums`` is
        ``(5, 2, R, C)``, the second dimension mean and variance. Float64.
    """

    num_steps: int
    weights: Tensor
    """By rank: weight of all steps, weight of those with known noise, number of steps."""
    sums: Tensor
    """Differences, their variance, the square of that over its degrees of freedom, the scale, squared differences."""

    @classmethod
    def empty(cls, num_ranks: int, num_channels: int, device: torch.device | str | None = None) -> RankContrast:
        """The contrast of no steps."""
        weights = torch.zeros(3, num_ranks, 1, dtype=torch.float64, device=device)
        return cls(0, weights, weights.new_zeros(5, 2, num_ranks, num_channels))

    def add(self, ranks: Sequence[ImageMoments]) -> RankContrast:
        """With one step more, of which ``ranks`` are the moments by rank. A rank without images has no part in it."""
        return self.merge(RankContrast.of_step(ImageMoments.stacked(ranks)))

    @classmethod
    def of_step(cls, ranks: ImageMoments) -> RankContrast:
        """The contrast of one step, of which ``ranks`` are the stacked moments (`ImageMoments.stacked`)."""
        pooled = ranks.pooled()
        images = ranks.num_images  # (R, 1) or (R, C), as all counts
        weight = images * (pooled.num_images - images) / pooled.num_images.clamp(min=1)
        degrees = (images - 1).clamp(min=0).sum(0)
        weights = torch.stack([weight, weight * (degrees > 0), (weight > 0).double()])
        squares, square_noise = ranks.spread_about(pooled.mean)
        other_squares = _of_others(squares, ranks.num_values)
        per_degree = 1 / (pooled.positions.square() * degrees.clamp(min=1))
        differences = torch.stack([ranks.mean - _of_others(ranks.mean, ranks.num_values), squares - other_squares])
        noise = torch.stack([ranks.sums[1].sum(0), square_noise.sum(0)]) * per_degree  # (2, C)
        scales = torch.stack([pooled.var.expand_as(squares), other_squares])
        return cls(1, weights, _sums(differences, noise.unsqueeze(1), degrees, scales, weights))

    def merge(self, other: RankContrast) -> RankContrast:
        """Of both together, of disjoint steps."""
        return RankContrast(self.num_steps + other.num_steps, self.weights + other.weights, self.sums + other.sums)

    @property
    def mean(self) -> Difference:
        """Of the batch means, in standard deviations of the values."""
        difference, scale = self.sums[0, 0], self.sums[3, 0]
        z, degrees = self._in_standard_errors(0)
        return Difference(z, degrees, difference / (self.weights[0] * scale).sqrt())

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
        total, known, num_steps = self.weights
        is_known = known > 0
        between = (squares - difference.square() / total).clamp(min=0) / (num_steps - 1).clamp(min=1)
        variance = torch.where(is_known, noise / known, between) * total
        degrees = torch.where(is_known, noise.square() / squared_noise, num_steps - 1)
        is_comparable = (total > 0) & (degrees > 0)
        return torch.where(is_comparable, difference / variance.sqrt(), torch.nan), degrees


def _least_skewed(excess: Tensor) -> Tensor:
    """What z of a mean square is to be multiplied with, if it is ``excess`` more than the others', relatively.

    A mean square of few images is skewed to the right, and its cube root hardly (Wilson and Hilferty 1931): against
    many images of others, z of the cube roots is the better one. Against as few, z of the squares is. The smaller of
    both is safe in either case.
    """
    slope = 3 * ((1 + excess).clamp(min=0).pow(1 / 3) - 1) / excess
    return torch.where(excess > 0, slope, 1.0)


def _of_others(values: Tensor, counts: Tensor) -> Tensor:
    """For each rank the mean over the values of all others, ``(R, C)``; ``counts`` are ``(R, 1)`` or ``(R, C)``."""
    weighted = values * counts
    return (weighted.sum(0) - weighted) / (counts.sum(0) - counts).clamp(min=1)


def _sums(difference: Tensor, variance: Tensor, degrees: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """``(5, 2, R, C)``, see `RankContrast.sums`; of ``(2, R, C)`` each, or what broadcasts."""
    weight, known, _ = weights
    noise = (known * variance).expand_as(difference)
    squared_noise = noise.square() / degrees.clamp(min=1)
    weighted = weight * difference
    return torch.stack([weighted, noise, squared_noise, weight * scale, weighted * difference])
