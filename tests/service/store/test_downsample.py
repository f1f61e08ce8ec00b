import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store.downsample import MIN_POINTS, downsample

_VALUES = st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])), max_size=300)


@settings(max_examples=200, deadline=None)
@given(values=_VALUES, max_points=st.integers(MIN_POINTS, 60))
def test_extremes_and_every_kind_of_non_finite_value_stay(values: list[float], max_points: int) -> None:
    series = np.array(values, dtype=np.float64)
    kept = downsample(series, max_points)
    assert len(kept) <= max_points
    assert np.all(np.diff(kept) > 0)
    told = series[kept]
    finite = series[np.isfinite(series)]
    if len(finite):
        assert told[np.isfinite(told)].max() == finite.max()
        assert told[np.isfinite(told)].min() == finite.min()
    for kind in (np.isnan, np.isposinf, np.isneginf):
        where = np.flatnonzero(kind(series))
        if len(where):
            assert where[0] in kept  # the first of each kind: where the trouble began


@settings(max_examples=100, deadline=None)
@given(values=_VALUES, max_points=st.integers(MIN_POINTS, 60))
def test_all_non_finite_values_stay_while_they_fill_at_most_half(values: list[float], max_points: int) -> None:
    series = np.array(values, dtype=np.float64)
    non_finite = set(np.flatnonzero(~np.isfinite(series)).tolist())
    if 2 * len(non_finite) <= max_points:
        assert non_finite <= set(downsample(series, max_points).tolist())


@settings(deadline=None)
@given(num_values=st.integers(0, 50))
def test_few_points_are_all_kept(num_values: int) -> None:
    assert downsample(np.zeros(num_values), 50).tolist() == list(range(num_values))


@pytest.mark.parametrize("max_points", [10, 500, 5000])
def test_each_bucket_keeps_its_least_and_its_greatest(max_points: int) -> None:
    series = np.random.default_rng(0).normal(size=20_000)
    kept = set(downsample(series, max_points).tolist())
    num_buckets = max_points // 2
    edges = [bucket * len(series) // num_buckets for bucket in range(num_buckets + 1)]
    for start, end in pairwise(edges):
        piece = series[start:end].tolist()
        assert start + piece.index(min(piece)) in kept
        assert start + piece.index(max(piece)) in kept


def test_a_diverged_tail_does_not_crowd_out_what_came_before() -> None:
    series = np.concatenate((np.linspace(2, 1, 5_000), np.full(45_000, np.nan)))
    kept = downsample(series, 500)
    assert 5_000 in kept
    assert {0, 4_999} <= set(kept.tolist())
    assert len(kept) <= 500
