import math

import pytest

from service.jobs import Schedule
from service.training.schedule import check_schedule, learning_rate


def test_a_constant_rate_is_constant() -> None:
    assert {learning_rate(step, 0.3, Schedule(), 10) for step in range(1, 11)} == {0.3}


def test_the_warmup_is_linear_and_full_at_its_last_step() -> None:
    rates = [learning_rate(step, 0.4, Schedule(warmup_steps=4), 10) for step in range(1, 7)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-15)


def test_a_cosine_starts_full_is_half_in_the_middle_and_would_end_at_zero() -> None:
    schedule = Schedule(name="cosine", warmup_steps=2)
    rates = [learning_rate(step, 2.0, schedule, 10) for step in range(1, 12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(1.0, abs=1e-15)
    assert rates[10] == pytest.approx(0.0, abs=1e-15)
    assert rates[9] == pytest.approx(1 + math.cos(7 / 8 * math.pi), abs=1e-15)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    check_schedule(Schedule(warmup_steps=9), 10)
    check_schedule(Schedule(), 1)
    with pytest.raises(ValueError, match="has only 10 steps; shorten the warmup"):
        check_schedule(Schedule(warmup_steps=10), 10)
