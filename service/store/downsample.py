"""Fewer points for a picture, without losing what the picture is for: extremes and non-finite values."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MIN_POINTS = 10
"""The fewest points that can be asked for; a bucket may need five."""


def downsample(values: NDArray[np.float64], max_points: int) -> NDArray[np.intp]:
    """Which of ``values`` to keep, as sorted indices: all, if there are at most ``max_points``.

    Otherwise the values are cut into equal buckets of consecutive points, and each bucket keeps its least and its
    greatest finite value. All non-finite values are kept while they take up no more than half of ``max_points``;
    beyond that each bucket keeps its first NaN, its first infinity and its first negative infinity.

    Shape: ``(n,) -> (m,)`` with ``m <= max(max_points, MIN_POINTS)``. Cost: a few passes over the values.
    """
    max_points = max(max_points, MIN_POINTS)
    if len(values) <= max_points:
        return np.arange(len(values))
    non_finite = np.flatnonzero(~np.isfinite(values))
    if 2 * len(non_finite) <= max_points:
        num_buckets = (max_points - len(non_finite)) // 2
        return np.union1d(non_finite, _extremes(values, num_buckets))
    num_buckets = max_points // 5
    return np.union1d(_first_of_each_kind(values, num_buckets), _extremes(values, num_buckets))


def _edges(num_values: int, num_buckets: int) -> NDArray[np.intp]:
    # No bucket is empty, because there are never more buckets than values.
    return np.arange(num_buckets, dtype=np.intp) * num_values // num_buckets


def _extremes(values: NDArray[np.float64], num_buckets: int) -> NDArray[np.intp]:
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return finite
    bucket = np.searchsorted(_edges(len(values), num_buckets), finite, side="right")
    starts = np.r_[0, np.flatnonzero(np.diff(bucket)) + 1]
    lengths = np.diff(np.r_[starts, len(finite)])
    kept: list[NDArray[np.intp]] = []
    for extreme in (np.minimum, np.maximum):
        of_bucket = np.repeat(extreme.reduceat(values[finite], starts), lengths)
        where = np.flatnonzero(values[finite] == of_bucket)
        kept.append(finite[where[np.unique(bucket[where], return_index=True)[1]]])
    return np.concatenate(kept)


def _first_of_each_kind(values: NDArray[np.float64], num_buckets: int) -> NDArray[np.intp]:
    edges = _edges(len(values), num_buckets)
    first: list[NDArray[np.intp]] = []
    for kind in (np.isnan(values), np.isposinf(values), np.isneginf(values)):
        where = np.flatnonzero(kind)
        bucket = np.searchsorted(edges, where, side="right")
        first.append(where[np.unique(bucket, return_index=True)[1]])
    return np.concatenate(first)


def means_of_stretches(
    windows: Iterable[tuple[NDArray[np.int64], NDArray[np.float64]]], first_step: int, last_step: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """The mean of each ``length`` consecutive steps, told at the last of them, and the number of all values.

    ``windows`` are steps and values in any order, between ``first_step`` and ``last_step``. Where a value is not
    finite, that value is told at its step, in place of the mean, unless the stretch's last step is later: then both.

    Shape: ``(k,), (k,)``. Cost: a few passes over each window and 40 bytes a stretch.
    """
    num_stretches = (last_step - first_step) // length + 1
    sums, counts = np.zeros(num_stretches), np.zeros(num_stretches, np.int64)
    last_steps = np.zeros(num_stretches, np.int64)
    trouble: dict[int, float] = {}
    for steps, values in windows:
        stretch = (steps - first_step) // length
        with np.errstate(invalid="ignore", over="ignore"):
            sums += np.bincount(stretch, values, num_stretches)
        counts += np.bincount(stretch, minlength=num_stretches)
        np.maximum.at(last_steps, stretch, steps)
        ill = np.flatnonzero(~np.isfinite(values))
        for i in ill[np.unique(stretch[ill], return_index=True)[1]]:
            trouble.setdefault(int(steps[i]), float(values[i]))
    told = counts > 0
    points = dict(zip(last_steps[told].tolist(), (sums[told] / counts[told]).tolist(), strict=True)) | trouble
    order = sorted(points)
    return np.array(order), np.array([points[step] for step in order]), int(counts.sum())
