"""Block means and trends against closed forms, numpy and scipy."""

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from service.reports.blocks import block_means, fit_trend, residual_correlation


def test_block_means_count_from_the_end_and_leave_out_the_oldest() -> None:
    assert block_means(np.arange(7.0), 3).tolist() == [2.0, 5.0]


def test_block_means_of_the_largest_numbers_do_not_overflow() -> None:
    largest = np.full(40, np.finfo(np.float64).max)
    assert np.isfinite(block_means(largest, 20)).all()


def test_a_trend_is_the_line_and_interval_of_scipy() -> None:
    y = np.random.default_rng(0).standard_normal(10) + np.arange(10) / 3
    trend, line = fit_trend(y), stats.linregress(np.arange(10), y)
    half_width = stats.t.ppf(0.975, 8) * line.stderr
    expected = 10 * np.array([line.slope, line.slope - half_width, line.slope + half_width])
    np.testing.assert_allclose([trend.change, trend.low, trend.high], expected, rtol=1e-12)


def test_a_trend_needs_three_points() -> None:
    with pytest.raises(ValueError, match="at least 3 block means, not 2"):
        fit_trend(np.zeros(2))


def test_independent_noise_shows_no_correlation_on_average() -> None:
    """Standard error of the mean of 2,000 values of sd below 0.17 is below 0.004; 0.016 is four of them."""
    rng = np.random.default_rng(1)
    correlations = [residual_correlation(rng.standard_normal(40)) for _ in range(2000)]
    assert np.std(correlations) < 0.17
    assert abs(np.mean(correlations)) < 0.016


def test_remembering_noise_shows_its_correlation() -> None:
    noise = lfilter([1], [1, -0.8], np.random.default_rng(2).standard_normal(2000))
    assert residual_correlation(noise) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("shape", [lambda t: 5 * t, lambda t: 9 * t**2 - t, lambda t: t**3])
def test_a_smooth_course_alone_is_no_correlation(shape: object) -> None:
    assert callable(shape)
    t = np.linspace(0, 1, 40)
    noise = np.random.default_rng(3).standard_normal(40)
    assert residual_correlation(noise + 100 * shape(t)) == pytest.approx(residual_correlation(noise), abs=1e-9)
    assert residual_correlation(shape(t)) == 0


def test_a_constant_has_no_correlation() -> None:
    assert residual_correlation(np.full(40, 0.1)) == 0
