"""Each rank against the others in every layer, channel and quantity at once, and against whom exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncbn.drift.ranks import RankContrast
from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.exclusion import without
from syncbn.monitor.finding import RankFinding, RankQuantity
from syncbn.monitor.layout import Layout
from syncbn.monitor.normal_score import normal_score

_CONSTANT = 1e-10  # of the mean square: below it a variance is rounding, and says as little as none
_EXPLAINED = 0.1  # of what one rank explains in another: what is left is not told from batches of changing size
_QUANTITIES = (RankQuantity.MEAN, RankQuantity.VARIANCE)


@dataclass(frozen=True, eq=False)
class JoinedContrast:
    """The contrast of all layers in a row, ``(C,)`` channels, over some samples, of which a layer need not be in all.

    ``varies``: in which channels values have varied in each sample. ``num_samples``: by channel, that it was in.
    """

    contrast: RankContrast
    varies: Tensor
    num_samples: Tensor

    @classmethod
    def of_step(cls, ranks: ImageMoments) -> JoinedContrast:
        """Of one sample, from the stacked moments of ranks with their counts by channel."""
        mean_squares = (ranks.num_values * ranks.mean.square()).sum(0)
        varies = ranks.sums[0].sum(0) > _CONSTANT * mean_squares
        return cls(RankContrast.of_step(ranks), varies, torch.ones_like(mean_squares))

    def merge(self, other: JoinedContrast) -> JoinedContrast:
        """Of both, of disjoint samples."""
        num_samples = self.num_samples + other.num_samples
        return JoinedContrast(self.contrast.merge(other.contrast), self.varies & other.varies, num_samples)

    def spread(self, places: Tensor, num_channels: int) -> JoinedContrast:
        """The same channels at ``places`` of a longer row, and no sample of all others."""
        contrast, rows = self.contrast, (self.contrast.weights, self.contrast.sums, self.num_samples)
        weights, sums, num_samples = (
            row.new_zeros(*row.shape[:-1], num_channels).index_copy_(-1, places, row) for row in rows
        )
        varies = torch.ones(num_channels, dtype=torch.bool).index_copy_(0, places, self.varies)
        return JoinedContrast(RankContrast(contrast.num_steps, weights, sums), varies, num_samples)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All tests over one stretch of samples; tensors are ``(2, R, C)``: mean and variance, rank, channel of any layer.

    ``t`` is Student's with ``degrees`` of freedom, 0 where nothing can be compared; ``size`` as in `RankFinding`.
    """

    layout: Layout
    """In order of execution."""
    joined: JoinedContrast
    t: Tensor
    degrees: Tensor
    size: Tensor

    @classmethod
    def of(cls, layout: Layout, joined: JoinedContrast) -> Comparison:
        """Each rank against all others."""
        mean, variance = joined.contrast.mean, joined.contrast.variance
        t, degrees = torch.stack([mean.z, variance.z]), torch.stack([mean.degrees, variance.degrees])
        size = torch.stack([mean.size, variance.size])
        known = joined.varies & t.isfinite() & size.isfinite()
        t, degrees, size = torch.where(known, t, 0.0), torch.where(known, degrees, 1.0), torch.where(known, size, 0.0)
        return cls(layout, joined, t, degrees, size)

    @property
    def num_tests(self) -> int:
        """Of ranks and quantities, in the channels that were in any sample."""
        return 2 * self.t.size(1) * int((self.joined.num_samples > 0).sum())

    def one_by_one(self, num_images: Tensor, threshold: float) -> Comparison:
        """The rank that differs most is taken out and the others compared without it, till none passes or two are left.

        ``num_images``: of each rank in all samples, ``(R,)``.
        """
        compared, explained = self, torch.zeros_like(self.t)
        share = num_images / num_images.sum()
        for _ in range(int((share > 0).sum()) - 2):
            largest = torch.where(share > 0, compared.z.abs().amax((0, 2)), 0.0)
            q = int(largest.argmax())
            if largest[q] <= threshold:
                break
            explained = explained + _explained(compared.t[:, [q]], share, q)
            compared = compared._without(q, share, explained)
            share = torch.where(torch.arange(len(share)) == q, 0.0, share / (1 - share[q]))
        return compared

    def _without(self, rank: int, share: Tensor, explained: Tensor) -> Comparison:
        """Of all ranks but one, less what is no more than a tenth of what is ``explained``, ``(2, R, C)``."""
        left = replace(self.joined, contrast=without(self.joined.contrast, rank, share))
        rest = Comparison.of(self.layout, left)
        return replace(rest, t=torch.where(rest.t.abs() > _EXPLAINED * explained, rest.t, 0.0))

    @property
    def z(self) -> Tensor:
        """`t` on the scale of the normal distribution."""
        return normal_score(self.t, self.degrees)

    def findings(self, threshold: float, min_size: float) -> list[RankFinding]:
        """One of each rank: its earliest difference that fires, else its earliest beyond chance, else its largest."""
        z = normal_score(self.t, self.degrees)
        return [self._finding(rank, z[:, rank], threshold, min_size) for rank in range(z.size(1))]

    def _finding(self, rank: int, z: Tensor, threshold: float, min_size: float) -> RankFinding:
        significant = z.abs() > threshold
        serious = significant & (self.size[:, rank].abs() >= min_size)
        quantity, channel = self._earliest(serious if serious.any() else significant, z)
        path, channel_of_layer = self.layout.name(channel)
        return RankFinding(
            rank=rank,
            layer=path,
            channel=channel_of_layer,
            quantity=_QUANTITIES[quantity],
            z=float(z[quantity, channel]),
            threshold=threshold,
            size=float(self.size[quantity, rank, channel]),
            num_samples=int(self.joined.num_samples[channel]),
            min_size=min_size,
        )

    def _earliest(self, candidates: Tensor, z: Tensor) -> tuple[int, int]:
        """Quantity and channel of the largest among the ``(2, C)`` candidates of the first layer with any, else of all.

        The mean goes first, as the variance about the mean of all ranks follows it.
        """
        if candidates.any():
            layer_of = self.layout.layer_of
            candidates = candidates & (layer_of == layer_of[candidates.any(0)].min())
            quantity = int(not candidates[0].any())
            return quantity, int(torch.where(candidates[quantity], z[quantity].abs(), -1.0).argmax())
        return divmod(int(z.abs().argmax()), z.size(1))


def _explained(t: Tensor, share: Tensor, rank: int) -> Tensor:
    """By how many standard errors ``t`` of ``rank``, ``(2, 1, C)``, moves the others; 0 for those that are out."""
    p, p_q = share.unsqueeze(1), share[rank]
    part = (p_q * p / (1 - p_q - p)).sqrt()
    is_other = ((share > 0) & (torch.arange(len(share)) != rank)).unsqueeze(1)
    return torch.where(is_other, part, 0.0) * t.abs()
