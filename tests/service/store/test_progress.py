import math

import pytest

from service.jobs import Progress
from service.store.progress import advance
from tests.service.store.telling import drift, started, step


def test_there_is_no_progress_before_a_rank_has_started() -> None:
    assert advance(None, [step(1)], 1, 1.0) is None


def test_a_resumed_attempt_goes_on_from_its_checkpoint() -> None:
    before = Progress(step=70, total_steps=100, epoch=7, train_loss=0.5, validation_loss=0.25, step_s=2.0)
    after = advance(before, [started(resumed_step=60)], 60, None)
    assert after is not None
    assert (after.step, after.validation_loss, after.train_loss, after.remaining_s) == (60, 0.25, 0.5, 80.0)


def test_the_step_time_is_an_exponential_mean_of_finite_durations() -> None:
    before = Progress(step=1, total_steps=100, epoch=0, step_s=1.0)
    durations = [3.0] * 10
    expected = 1.0
    for duration in durations:
        expected += (duration - expected) / 20
    after = advance(before, [step(n, step_s=d) for n, d in enumerate([*durations, math.nan])], 10, None)
    assert after is not None
    assert after.step_s == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shifts", [(math.nan, 1.0), (1.0, math.nan)])
def test_a_layer_whose_drift_is_no_number_is_the_worst(shifts: tuple[float, float]) -> None:
    after = advance(None, [started(), drift(1, first=shifts[0], second=shifts[1])], 1, None)
    assert after is not None
    assert after.worst_layer_drift is not None
    assert math.isnan(after.worst_layer_drift)


def test_nothing_remains_at_the_end() -> None:
    after = advance(None, [started(), step(100)], 100, 0.1)
    assert after is not None
    assert after.remaining_s == 0.0
