"""The Kaplan-Meier median against a reckoning by hand and against scipy."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from service.reports import kaplan_meier_median


def test_the_median_is_that_of_a_reckoning_by_hand() -> None:
    """Survival 4/5 at 2, then of 3 at risk at 4 (3 was censored) 8/15, of 2 at 5 4/15: half are there by 5."""
    found = kaplan_meier_median([4, 2, 3, 5, 9], [True, True, False, True, False])
    assert (found.median, found.num_runs, found.num_reached) == (5, 5, 3)
    assert found.high is None
    assert "3 of 5 runs" in found.sentence


def test_runs_that_never_arrive_make_the_median_later_or_unknown() -> None:
    assert kaplan_meier_median([1, 2, 3, 4], [True] * 4).median == 2
    assert kaplan_meier_median([1, 2, 3, 4, 5, 5], [True] * 4 + [False] * 2).median == 3
    assert kaplan_meier_median([1, 5, 5], [True, False, False]).median is None
    assert kaplan_meier_median([], []).median is None


def test_a_time_below_zero_or_no_number_is_refused() -> None:
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="at least 0"):
            kaplan_meier_median([bad], [True])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:The confidence interval is undefined")
def test_median_and_interval_are_those_of_scipys_survival_function(seed: int) -> None:
    """With ties and censoring; the first time at which each of scipy's curves is at most one half."""
    rng = np.random.default_rng(seed)
    times, there = rng.integers(1, 20, 30).astype(float), rng.random(30) < 0.8
    curve = stats.ecdf(stats.CensoredData(uncensored=times[there], right=times[~there])).sf
    limits: Any = curve.confidence_interval(method="log-log")
    expected = [
        next((t for t, p in zip(curve.quantiles, probabilities, strict=True) if p <= 0.5), None)
        for probabilities in (curve.probabilities, limits.low.probabilities, limits.high.probabilities)
    ]
    found = kaplan_meier_median(times.tolist(), there.tolist())
    assert [found.median, found.low, found.high] == expected
