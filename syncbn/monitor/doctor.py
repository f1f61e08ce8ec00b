"""The rank doctor: which rank sees other data than the rest, by what its layers were fed in the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.comparison import Comparison, JoinedContrast
from syncbn.monitor.finding import RankFinding
from syncbn.monitor.layout import Layout
from syncbn.monitor.normal_score import normal_threshold

WINDOW = 20
"""Samples after which a new window begins, so that a fault that begins late is not diluted by what was before."""

MIN_SAMPLES = 5
"""Below, what chance does is not yet known well enough."""

MIN_SIZE = 0.1
"""In standard deviations, or in nats of log variance: what a difference has to reach to matter."""

_NUM_REPEATS = 3  # samples in a row
_ALIKE = 1e-6  # of a variance, so that rounding does not make images differ


class RankDoctor:
    """Takes in samples of steps from all ranks and tells, at each, what is known of each rank.

    Every rank is tested in every layer and channel, for mean and variance, over all samples and over those of the
    present window. At look ``k`` the probability of any false finding is ``false_alarms * 6 / (pi k)^2`` at most, by
    Bonferroni's inequality over all of these tests; over the looks of a run, however many, that adds up to
    ``false_alarms``.

    A rank that differs makes every other one differ from the rest by a share of it. So the one that differs most is
    taken out of the comparison and the others are judged without it, until none is found or two are left.

    Memory: ``26 R C`` doubles for ``R`` ranks and the ``C`` channels of all layers, however many samples.
    Raises: ValueError if ``false_alarms`` is not between 0 and 1.
    """

    def __init__(self, num_ranks: int, *, false_alarms: float = 0.01, min_size: float = MIN_SIZE) -> None:
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms is the probability of any in a run, between 0 and 1; got {false_alarms}")
        self._num_ranks = num_ranks
        self._false_alarms = false_alarms
        self._min_size = min_size
        self._layout = Layout.of({})
        self._run: JoinedContrast | None = None
        self._window: JoinedContrast | None = None
        self._num_images = torch.zeros(num_ranks, dtype=torch.float64)
        self._num_samples = 0
        self._num_looks = 0
        self._num_repeats = [0] * num_ranks

    def look(self, layers: Mapping[str, Sequence[ImageMoments]]) -> tuple[RankFinding, ...]:
        """Take in one step: by layer, in order of execution, the moments of its input on each rank, on the CPU.

        Layers with a number that is not finite on some rank are passed over in this step.

        Returns:
            One finding for each rank, in order: the earliest difference that fires, else the earliest that is more
            than chance, else the largest. Nothing for one rank, or before the fifth sample.
        """
        if self._num_ranks < 2 or not layers:
            return ()
        sizes = {path: len(ranks[0].mean) for path, ranks in layers.items()}
        row = _side_by_side([ImageMoments.stacked(ranks) for ranks in layers.values()])
        return self.look_at_row(Layout.of(sizes), row)

    def look_at_row(self, layout: Layout, ranks: ImageMoments) -> tuple[RankFinding, ...]:
        """As `look`, with the stacked moments of ranks for the channels of all layers in a row, counts by channel."""
        layout, ranks = _finite_layers(layout, ranks)
        if self._num_ranks < 2 or not layout.sizes:
            return ()
        first = ranks.of_channels(layout.slice_of(0))
        self._num_images += first.num_images[:, 0]
        self._count_repeats(first)
        if self._num_samples % WINDOW == 0:
            self._window = None
        self._num_samples += 1
        self._take_in(layout, JoinedContrast.of_step(ranks))
        return self._findings() if self._num_samples >= MIN_SAMPLES else ()

    @property
    def repeating_ranks(self) -> tuple[int, ...]:
        """Ranks of which all images of a batch were the same, in each of the last three samples."""
        return tuple(rank for rank, number in enumerate(self._num_repeats) if number >= _NUM_REPEATS)

    def _count_repeats(self, ranks: ImageMoments) -> None:
        repeats = _repeats(ranks, ranks.pooled()).tolist()
        for number, num_images in enumerate(ranks.num_images[:, 0].tolist()):
            if num_images >= 2:
                self._num_repeats[number] = self._num_repeats[number] + 1 if repeats[number] else 0

    def _take_in(self, layout: Layout, step: JoinedContrast) -> None:
        """Layers that are new go behind those that were there."""
        if list(layout.sizes) != list(self._layout.sizes):
            before = self._layout.num_channels
            self._layout = Layout.of({**self._layout.sizes, **layout.sizes})
            step = step.spread(self._layout.places_of(list(layout.sizes)), self._layout.num_channels)
            self._run, self._window = (
                joined and joined.spread(torch.arange(before), self._layout.num_channels)
                for joined in (self._run, self._window)
            )
        self._run = self._run.merge(step) if self._run else step
        self._window = self._window.merge(step) if self._window else step

    def _findings(self) -> tuple[RankFinding, ...]:
        self._num_looks += 1
        assert self._run is not None
        stretches = [self._run]
        if (self._num_samples - 1) % WINDOW + 1 >= MIN_SAMPLES and self._num_samples > WINDOW:
            assert self._window is not None
            stretches.append(self._window)
        comparisons = [Comparison.of(self._layout, joined) for joined in stretches]
        level = self._false_alarms * 6 / (math.pi * self._num_looks) ** 2
        threshold = normal_threshold(level / sum(comparison.num_tests for comparison in comparisons))
        found = [
            comparison.one_by_one(self._num_images, threshold).findings(threshold, self._min_size)
            for comparison in comparisons
        ]
        places = {path: place for place, path in enumerate(self._layout.sizes)}
        return tuple(min(of_rank, key=lambda one: _urgency(one, places)) for of_rank in zip(*found, strict=True))


def _urgency(finding: RankFinding, places: Mapping[str, int]) -> tuple[bool, bool, int, float]:
    """What fires goes first, then what is more than chance; of those the earlier layer, and the larger."""
    place = places[finding.layer] if finding.is_significant else 0
    return not finding.fires, not finding.is_significant, place, -abs(finding.z)


def _repeats(ranks: ImageMoments, pooled: ImageMoments) -> Tensor:
    """Whether the images on a rank are alike in every channel in which images differ at all, ``(R,)``."""
    differs = (pooled.between_var > _ALIKE**2 * (pooled.var + pooled.mean.square())) & pooled.between_var.isfinite()
    same_means = ranks.between_var <= _ALIKE * pooled.between_var
    same_squares = ranks.square_between_var <= _ALIKE * pooled.square_between_var
    return differs.any() & ((same_means & same_squares) | ~differs).all(1)


def _finite_layers(layout: Layout, ranks: ImageMoments) -> tuple[Layout, ImageMoments]:
    """Without layers that have a number that is not finite on some rank."""
    is_finite = (ranks.mean.isfinite() & ranks.sums.isfinite()).flatten(0, -2).all(0)
    if is_finite.all():
        return layout, ranks
    spoiled = set(layout.layer_of[~is_finite].tolist())
    sizes = {path: size for number, (path, size) in enumerate(layout.sizes.items()) if number not in spoiled}
    return Layout.of(sizes), ranks.of_channels(layout.places_of(list(sizes)))


def _side_by_side(layers: Sequence[ImageMoments]) -> ImageMoments:
    """Stacked moments of several layers as those of one row, with counts by channel."""
    num_images, num_values, num_squared = (
        torch.cat([count.expand_as(layer.mean) for count, layer in zip(counts, layers, strict=True)], 1)
        for counts in zip(*((layer.num_images, layer.num_values, layer.num_squared) for layer in layers), strict=True)
    )
    mean, sums = torch.cat([layer.mean for layer in layers], 1), torch.cat([layer.sums for layer in layers], 2)
    return ImageMoments(num_images, num_values, num_squared, mean, sums)
