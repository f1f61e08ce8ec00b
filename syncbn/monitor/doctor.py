"""The rank doctor: which rank sees other data than the rest, by what its layers were fed in the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from syncbn.drift.sampling import ImageMoments
from syncbn.monitor.comparison import Comparison, LayerContrast
from syncbn.monitor.finding import RankFinding
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

    Memory: ``16 R C`` doubles for ``R`` ranks and the ``C`` channels of all layers, however many samples.
    Raises: ValueError if ``false_alarms`` is not between 0 and 1.
    """

    def __init__(self, num_ranks: int, *, false_alarms: float = 0.01, min_size: float = MIN_SIZE) -> None:
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms is the probability of any in a run, between 0 and 1; got {false_alarms}")
        self._num_ranks = num_ranks
        self._false_alarms = false_alarms
        self._min_size = min_size
        self._run: dict[str, LayerContrast] = {}
        self._window: dict[str, LayerContrast] = {}
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
        layers = {path: ranks for path, ranks in layers.items() if all(_is_finite(rank) for rank in ranks)}
        if self._num_ranks < 2 or not layers:
            return ()
        first = next(iter(layers.values()))
        self._num_images += torch.stack([rank.num_images for rank in first])
        self._count_repeats(first)
        if self._num_samples % WINDOW == 0:
            self._window.clear()
        self._num_samples += 1
        for path, ranks in layers.items():
            step = LayerContrast.of_step(ranks)
            for contrasts in (self._run, self._window):
                contrasts[path] = contrasts[path].merge(step) if path in contrasts else step
        return self._findings() if self._num_samples >= MIN_SAMPLES else ()

    @property
    def repeating_ranks(self) -> tuple[int, ...]:
        """Ranks of which all images of a batch were the same, in each of the last three samples."""
        return tuple(rank for rank, number in enumerate(self._num_repeats) if number >= _NUM_REPEATS)

    def _count_repeats(self, ranks: Sequence[ImageMoments]) -> None:
        pooled = reduce(ImageMoments.merge, ranks)
        for number, rank in enumerate(ranks):
            if rank.num_images >= 2:
                self._num_repeats[number] = self._num_repeats[number] + 1 if _repeats(rank, pooled) else 0

    def _findings(self) -> tuple[RankFinding, ...]:
        self._num_looks += 1
        stretches = [self._run]
        if (self._num_samples - 1) % WINDOW + 1 >= MIN_SAMPLES and self._num_samples > WINDOW:
            stretches.append(self._window)
        comparisons = [Comparison.of(contrasts) for contrasts in stretches]
        level = self._false_alarms * 6 / (math.pi * self._num_looks) ** 2
        threshold = normal_threshold(level / sum(comparison.t.numel() for comparison in comparisons))
        found = [
            comparison.one_by_one(self._num_images, threshold).findings(threshold, self._min_size)
            for comparison in comparisons
        ]
        places = {path: place for place, path in enumerate(self._run)}
        return tuple(min(of_rank, key=lambda one: _urgency(one, places)) for of_rank in zip(*found, strict=True))


def _urgency(finding: RankFinding, places: Mapping[str, int]) -> tuple[bool, bool, int, float]:
    """What fires goes first, then what is more than chance; of those the earlier layer, and the larger."""
    place = places[finding.layer] if finding.is_significant else 0
    return not finding.fires, not finding.is_significant, place, -abs(finding.z)


def _repeats(rank: ImageMoments, pooled: ImageMoments) -> bool:
    """Whether the images on this rank are alike in every channel in which images differ at all."""
    differs = (pooled.between_var > _ALIKE**2 * (pooled.var + pooled.mean.square())) & pooled.between_var.isfinite()
    same_means = rank.between_var <= _ALIKE * pooled.between_var
    same_squares = rank.square_between_var <= _ALIKE * pooled.square_between_var
    return bool(differs.any() and (same_means & same_squares)[differs].all())


def _is_finite(moments: ImageMoments) -> bool:
    return bool(moments.mean.isfinite().all() and moments.sums.isfinite().all())
