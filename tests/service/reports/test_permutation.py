"""Permutation tests against scipy's, and Holm's correction against a reckoning by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from service.reports.permutation import holm, paired_p, smallest_p, unpaired_p


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_paired_p_is_that_of_scipys_exact_test(seed: int, step: float) -> None:
    """To 1e-12; rounding to halves makes ties."""
    d = np.random.default_rng(seed).normal(0.4, 1, 7)
    d = np.round(d / step) * step if step else d
    exact = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=1000)
    assert paired_p(d.tolist()) == pytest.approx(exact.pvalue, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 6), (2, 5)])
def test_unpaired_p_is_that_of_scipys_exact_test(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, n).round(1), rng.normal(0, 1, m).round(1)
    exact = stats.permutation_test((a, b), lambda x, y: x.mean() - y.mean(), n_resamples=1000)
    assert unpaired_p(a.tolist(), b.tolist()) == pytest.approx(exact.pvalue, abs=1e-12)


def test_the_smallest_p_is_what_the_most_extreme_values_give() -> None:
    for n in (1, 3, 5, 8):
        assert paired_p([1.0 + k / 10 for k in range(n)]) == smallest_p(n, n, paired=True) == min(1.0, 2 / 2**n)
        low, high = [0.1 * k for k in range(n)], [5 + 0.1 * k for k in range(n)]
        expected = min(1.0, 2 / math.comb(2 * n, n))
        assert unpaired_p(low, high) == pytest.approx(smallest_p(n, n, paired=False), abs=1e-12)
        assert smallest_p(n, n, paired=False) == expected


def test_many_runs_are_tested_on_drawn_arrangements() -> None:
    """20 pairs of no difference: near the p of the t test, which such a sample follows to about 0.02."""
    d = np.random.default_rng(3).standard_normal(20)
    assert paired_p(d.tolist()) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)
    a, b = d[:10], np.random.default_rng(4).standard_normal(12)
    assert unpaired_p(a.tolist(), b.tolist()) == pytest.approx(stats.ttest_ind(a, b).pvalue, abs=0.03)
    assert smallest_p(20, 20, paired=True) == 2e-5


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06), abs=1e-15)
    assert holm([0.6, 0.5]) == (1.0, 1.0)
    assert holm([]) == ()


def test_groups_without_finite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="finite values"):
        paired_p([])
    with pytest.raises(ValueError, match="finite values"):
        unpaired_p([1.0], [math.nan])
