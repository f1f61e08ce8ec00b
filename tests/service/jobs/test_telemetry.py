"""Telemetry on the wire: what is not finite and what is unknown."""

import math

import pytest
from pydantic import ValidationError

from service.jobs import (
    TELEMETRY_EVENT,
    IngestBatch,
    JobSpec,
    RankBatch,
    ReplayedMomentum,
    StepMetrics,
    attempt_id,
    job_of_attempt,
)
from service.jobs import new_job_id as new_id


def test_a_loss_that_is_not_finite_survives_json() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        step = StepMetrics(step=1, epoch=0, loss=loss, learning_rate=0.1, step_s=0.01)
        text = step.model_dump_json()
        assert "NaN" not in text.replace('"NaN"', "")
        back = TELEMETRY_EVENT.validate_json(text)
        assert isinstance(back, StepMetrics)
        assert math.isnan(back.loss) if math.isnan(loss) else back.loss == loss


def test_a_batch_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError):
        IngestBatch.model_validate(
            {"batches": [{"rank": 0, "first_seq": 0, "times": [1.0], "events": [{"type": "x"}]}]}
        )


def test_a_batch_must_say_when_each_fact_happened() -> None:
    step = StepMetrics(step=1, epoch=0, loss=1.0, learning_rate=0.1, step_s=0.01)
    with pytest.raises(ValidationError, match="times"):
        RankBatch(rank=0, first_seq=0, times=(), events=(step,))


def test_ids_sort_by_birth_and_attempts_name_their_job() -> None:
    first, second = new_id(), new_id()
    assert first[:12] <= second[:12]
    assert first != second
    assert job_of_attempt(attempt_id(first, 12)) == (first, 12)
    for wrong in ("job_1", "job_1-x", "x-1", ""):
        with pytest.raises(ValueError, match="not an attempt id"):
            job_of_attempt(wrong)


def test_the_spec_in_the_wire_format_keeps_its_own_rules() -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate_json('{"name": "x"}')


def test_a_replayed_momentum_of_an_earlier_version_is_read_without_its_empty_scores() -> None:
    told = {"momentum": 0.1, "rms_mean_shift": 0.2, "output_error": 0.3}
    assert ReplayedMomentum.model_validate(told | {"scores": None}) == ReplayedMomentum(**told)
    assert "scores" not in ReplayedMomentum.model_fields
    with pytest.raises(ValidationError, match="scores"):
        ReplayedMomentum.model_validate(told | {"scores": {"loss": 0.1}})
