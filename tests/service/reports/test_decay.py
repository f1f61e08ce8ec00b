"""Laws of falling losses: planted ones are found, others are refused."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from service.jobs import Decay, DecayLaw
from service.reports import LossCourse, fit_decay

_T = np.arange(1, 4001)


def _fit(course: NDArray[np.float64], noise: float = 0.1, seed: int = 0) -> Decay:
    spread = noise * np.random.default_rng(seed).standard_normal(len(course))
    return fit_decay(range(1, len(course) + 1), (course * (1 + spread)).tolist())


def _holds(decay: Decay, floor: float, rate: float, later: float) -> list[bool]:
    assert decay.floor_interval is not None
    assert decay.rate_interval is not None
    assert decay.after_as_many_steps_again_interval is not None
    pairs = (
        (decay.floor_interval, floor),
        (decay.rate_interval, rate),
        (decay.after_as_many_steps_again_interval, later),
    )
    return [interval.low <= true <= interval.high for interval, true in pairs]


def test_a_power_law_is_found_again() -> None:
    """Of 8 noisy series at least 6 intervals hold the truth: 7.2 are expected where 90 % do."""
    held = []
    for seed in range(8):
        decay = _fit(0.3 + 5 / np.sqrt(_T), 0.05, seed)
        assert decay.law is DecayLaw.POWER
        held.append(_holds(decay, 0.3, 0.5, 0.3 + 5 / math.sqrt(8000)))
    assert (np.sum(held, axis=0) >= 6).all()


def test_an_exponential_is_found_again() -> None:
    held = []
    for seed in range(8):
        decay = _fit(0.2 + 2 * np.exp(-_T / 2000), 0.1, seed)
        assert decay.law is DecayLaw.EXPONENTIAL
        assert decay.aicc_advantage is not None
        assert decay.aicc_advantage > 2
        held.append(_holds(decay, 0.2, 2000, 0.2 + 2 * math.exp(-4)))
    assert (np.sum(held, axis=0) >= 6).all()


def test_a_law_without_noise_is_exact() -> None:
    """Up to the last of three grids, each a 30th as wide as the one before: to 0.01 %."""
    decay = _fit(0.2 + 2 * np.exp(-_T / 1500), 0.0)
    assert (decay.floor, decay.amplitude, decay.rate) == pytest.approx((0.2, 2.0, 1500.0), rel=1e-4)
    assert decay.after_as_many_steps_again == pytest.approx(0.2 + 2 * math.exp(-8000 / 1500), rel=1e-3)


@pytest.mark.parametrize(
    ("course", "words"),
    [
        (np.ones(4000), "may already be at its floor"),
        (0.2 + 2 * np.exp(-_T / 300), "may already be at its floor"),
        (0.5 + 2 * np.exp(-_T / 800) - 0.3 * (_T > 2600), "do not follow one law"),  # the learning rate fell
        (1 - _T / 8000 + (_T > 2000) * (_T - 2000) / 2000, "do not follow one law"),  # it turned
        (np.ones(140), "30 are needed"),
        (np.ones(0), "30 are needed"),
    ],
)
def test_what_follows_no_law_gets_none(course: NDArray[np.float64], words: str) -> None:
    decay = _fit(course)
    assert decay.law is None
    assert decay.floor is None
    assert words in decay.sentence


def test_the_same_losses_give_the_same_law_streamed_or_whole() -> None:
    losses = 0.2 + 2 * np.exp(-_T / 2000)
    course = LossCourse()
    for begin in range(0, 4000, 371):
        course.add(_T[begin : begin + 371].tolist(), losses[begin : begin + 371].tolist())
    assert course.decay() == fit_decay(_T.tolist(), losses.tolist())
    course.add(4001, math.nan)
    assert "step 4001 is not finite" in course.decay().sentence


def test_losses_that_are_not_finite_or_out_of_order_are_refused() -> None:
    for steps, losses in (([1, 2], [1.0, math.nan]), ([2, 1], [1.0, 1.0]), ([1], [1.0, 2.0])):
        with pytest.raises(ValueError, match="finite losses, one for each of rising steps"):
            fit_decay(steps, losses)
