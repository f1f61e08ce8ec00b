"""Each rank against the others in every layer, channel and quantity at once, and against whom exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from syncbn.drift.ranks import RankContrast
from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.exclusion import without
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

    layers: Mapping[str, LayerContrast]
    """In order of execution."""
    t: Tensor
    degrees: Tensor
    size: Tensor

    @classmethod
    def of(cls, layers: Mapping[str, LayerContrast]) -> Comparison:
        """Each rank against all others."""
        means = [layer.contrast.mean for layer in layers.values()]
        variances = [layer.contrast.variance for layer in layers.values()]
        t, degrees, size = (
            torch.stack([torch.cat([getattr(one, name) for one in row], dim=1) for row in (means, variances)])
            for name in ("z", "degrees", "size")
        )
        known = torch.cat([layer.varies for layer in layers.values()]) & t.isfinite() & size.isfinite()
        return cls(layers, torch.where(known, t, 0.0), torch.where(known, degrees, 1.0), torch.where(known, size, 0.0))

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
        layers = {
            path: LayerContrast(without(layer.contrast, rank, share), layer.varies)
            for path, layer in self.layers.items()
        }
        rest = Comparison.of(layers)
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
        path, channel_of_layer = self._place(channel)
        return RankFinding(
            rank=rank,
            layer=path,
            channel=channel_of_layer,
            quantity=_QUANTITIES[quantity],
            z=float(z[quantity, channel]),
            threshold=threshold,
            size=float(self.size[quantity, rank, channel]),
            num_samples=self.layers[path].contrast.num_steps,
            min_size=min_size,
        )

    def _earliest(self, candidates: Tensor, z: Tensor) -> tuple[int, int]:
        """Quantity and channel of the largest among the ``(2, C)`` candidates of the first layer with any, else of all.

        The mean goes first, as the variance about the mean of all ranks follows it.
        """
        if candidates.any():
            sizes = torch.tensor([len(layer.varies) for layer in self.layers.values()])
            layer_of_channel = torch.arange(len(sizes)).repeat_interleave(sizes)
            candidates = candidates & (layer_of_channel == layer_of_channel[candidates.any(0)].min())
            quantity = int(not candidates[0].any())
            return quantity, int(torch.where(candidates[quantity], z[quantity].abs(), -1.0).argmax())
        return divmod(int(z.abs().argmax()), z.size(1))

    def _place(self, channel: int) -> tuple[str, int]:
        """Path of the layer, and the channel in it, for a channel of all layers in a row."""
        for path, layer in self.layers.items():
            if channel < len(layer.varies):
                return path, channel
            channel -= len(layer.varies)
        raise AssertionError("a channel beyond the last layer")


def _explained(t: Tensor, share: Tensor, rank: int) -> Tensor:
    """By how many standard errors ``t`` of ``rank``, ``(2, 1, C)``, moves the others; 0 for those that are out."""
    p, p_q = share.unsqueeze(1), share[rank]
    part = (p_q * p / (1 - p_q - p)).sqrt()
    is_other = ((share > 0) & (torch.arange(len(share)) != rank)).unsqueeze(1)
    return torch.where(is_other, part, 0.0) * t.abs()
