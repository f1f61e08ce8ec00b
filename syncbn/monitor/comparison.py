"""Each rank against the others in every layer, channel and quantity at once, and against whom exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.drift.ranks import RankContrast
from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.finding import RankFinding, RankQuantity
from syncbn.monitor.normal_score import normal_score

_CONSTANT = 1e-10  # of the mean square: below it a variance is rounding, and says as little as none
_EXPLAINED = 0.1  # of what one rank explains in another: what is left is not told from batches of changing size
_QUANTITIES = (RankQuantity.MEAN, RankQuantity.VARIANCE)


@dataclass(frozen=True, eq=False)
class LayerContrast:
    """The contrast of one layer, and in which channels values have varied in each step; boolean, ``(C,)``."""

    contrast: RankContrast
    varies: Tensor

    @classmethod
    def of_step(cls, ranks: Sequence[ImageMoments]) -> LayerContrast:
        """Of one step, from the moments by rank."""
        squares = torch.stack([rank.sums[0] for rank in ranks]).sum(0)
        mean_squares = torch.stack([rank.num_values * rank.mean.square() for rank in ranks]).sum(0)
        empty = RankContrast.empty(len(ranks), len(squares), squares.device)
        return cls(empty.add(ranks), squares > _CONSTANT * mean_squares)

    def merge(self, other: LayerContrast) -> LayerContrast:
        """Of both, of disjoint steps."""
        return LayerContrast(self.contrast.merge(other.contrast), self.varies & other.varies)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All tests over one stretch of samples; tensors are ``(2, R, C)``: mean and variance, rank, channel of any layer.

    ``t`` is Student's with ``degrees`` of freedom, 0 where nothing can be compared; ``size`` as in `RankFinding`.
    """

    paths: tuple[str, ...]
    num_samples: tuple[int, ...]
    num_channels: tuple[int, ...]
    t: Tensor
    degrees: Tensor
    size: Tensor

    @classmethod
    def of(cls, layers: Mapping[str, LayerContrast]) -> Comparison:
        """Each rank against all others, in layers in order of execution."""
        means = [layer.contrast.mean for layer in layers.values()]
        variances = [layer.contrast.variance for layer in layers.values()]
        t, degrees, size = (
            torch.stack([torch.cat([getattr(one, name) for one in row], dim=1) for row in (means, variances)])
            for name in ("z", "degrees", "size")
        )
        known = torch.cat([layer.varies for layer in layers.values()]) & t.isfinite() & size.isfinite()
        return cls(
            tuple(layers),
            tuple(layer.contrast.num_steps for layer in layers.values()),
            tuple(len(layer.varies) for layer in layers.values()),
            torch.where(known, t, 0.0),
            torch.where(known, degrees, 1.0),
            torch.where(known, size, 0.0),
        )

    def one_by_one(self, num_images: Tensor, threshold: float) -> Comparison:
        """The rank that differs most is taken out and the others compared without it, till none passes or two are left.

        Let ``p`` be the shares of the images of the ranks still compared, ``d`` what a rank differs by from its
        others, with a variance as ``1 / (p (1 - p))``. Without ``q`` the rank ``r`` differs from its others by
        ``((1 - p_r) d_r + p_q d_q) (1 - p_q) / (1 - p_q - p_r)``, with one as ``(1 - p_q) / (p_r (1 - p_q - p_r))``.
        That is exact where shares are the same in each sample; ``num_images`` are those of all samples, ``(R,)``.
        """
        t, size, explained = self.t, self.size, torch.zeros_like(self.t)
        share = num_images / num_images.sum()
        active = share > 0
        for _ in range(int(active.sum()) - 2):
            own = torch.where(t.abs() > _EXPLAINED * explained, t, 0.0)
            largest = torch.where(active, normal_score(own, self.degrees).abs().amax((0, 2)), 0.0)
            q = int(largest.argmax())
            if largest[q] <= threshold:
                break
            active[q] = False
            others, p, p_q = active.unsqueeze(1), share.unsqueeze(1), share[q]
            left = 1 - p_q - p
            explanation = t[:, [q]] * (p_q * p / left).sqrt()
            t = torch.where(others, t * ((1 - p) * (1 - p_q) / left).sqrt() + explanation, t)
            size = torch.where(others, ((1 - p) * size + p_q * size[:, [q]]) * ((1 - p_q) / left), size)
            explained = torch.where(others, explained + explanation.abs(), explained)
            share = share / (1 - p_q)
        own = torch.where(t.abs() > _EXPLAINED * explained, t, 0.0)
        return Comparison(self.paths, self.num_samples, self.num_channels, own, self.degrees, size)

    def findings(self, threshold: float, min_size: float) -> list[RankFinding]:
        """One of each rank: its earliest difference that fires, else its earliest beyond chance, else its largest."""
        z = normal_score(self.t, self.degrees)
        return [self._finding(rank, z[:, rank], threshold, min_size) for rank in range(z.size(1))]

    def _finding(self, rank: int, z: Tensor, threshold: float, min_size: float) -> RankFinding:
        significant = z.abs() > threshold
        serious = significant & (self.size[:, rank].abs() >= min_size)
        quantity, channel = self._earliest(serious if serious.any() else significant, z)
        layer, channel_of_layer = self._place(channel)
        return RankFinding(
            rank=rank,
            layer=self.paths[layer],
            channel=channel_of_layer,
            quantity=_QUANTITIES[quantity],
            z=float(z[quantity, channel]),
            threshold=threshold,
            size=float(self.size[quantity, rank, channel]),
            num_samples=self.num_samples[layer],
            min_size=min_size,
        )

    def _earliest(self, candidates: Tensor, z: Tensor) -> tuple[int, int]:
        """Quantity and channel of the largest among the ``(2, C)`` candidates of the first layer with any, else of all.

        The mean goes first, as the variance about the mean of all ranks follows it.
        """
        if candidates.any():
            layer_of_channel = torch.arange(len(self.paths)).repeat_interleave(torch.tensor(self.num_channels))
            candidates = candidates & (layer_of_channel == layer_of_channel[candidates.any(0)].min())
            quantity = int(not candidates[0].any())
            return quantity, int(torch.where(candidates[quantity], z[quantity].abs(), -1.0).argmax())
        return divmod(int(z.abs().argmax()), z.size(1))

    def _place(self, channel: int) -> tuple[int, int]:
        for layer, num_channels in enumerate(self.num_channels):
            if channel < num_channels:
                return layer, channel
            channel -= num_channels
        raise AssertionError("a channel beyond the last layer")
