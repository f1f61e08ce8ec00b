"""The page on a job: what is taken over, what is judged, and what is said of thinned series."""

from datetime import UTC, datetime, timedelta

import pytest

from service.jobs import (
    ConvergenceVerdict,
    DriftColour,
    Evaluation,
    Job,
    JobReport,
    JobSpec,
    JobState,
    MetricSeries,
    Normalization,
    RankStarted,
    Scores,
)
from service.reports import JobRecord, report_job

_BIRTH = datetime(2026, 1, 2, tzinfo=UTC)


def _job(state: JobState, data: str = "builtin:digits", **fields: datetime) -> Job:
    spec = JobSpec(name="report", epochs=2, data=data, normalization=Normalization.LOCAL)
    return Job.model_validate(
        {
            "id": "job_1",
            "spec": spec,
            "state": state,
            "version": 1,
            "created_at": _BIRTH,
            "state_since": _BIRTH,
            "updated_at": _BIRTH,
            **fields,
        }
    )


def _losses(*values: float, downsampled: str | None = None) -> MetricSeries:
    steps = tuple(range(1, len(values) + 1))
    return MetricSeries(
        name="loss", rank=None, steps=steps, values=values, num_points=len(values), downsampled=downsampled
    )


def _evaluation(step: int, loss_damage: float) -> Evaluation:
    return Evaluation(
        step=step,
        epoch=1,
        num_images=360,
        stored=Scores(loss=0.3 + loss_damage, accuracy=0.9),
        population=Scores(loss=0.3, accuracy=0.9),
        loss_damage=loss_damage,
        loss_damage_se=0.001,
        accuracy_damage=0.0,
        accuracy_damage_se=0.0,
    )


def _start(num_classes: int | None) -> RankStarted | None:
    if num_classes is None:
        return None
    return RankStarted(
        world_size=2,
        host="here",
        pid=1,
        device="cpu",
        resumed_step=0,
        total_steps=100,
        steps_per_epoch=50,
        num_train_images=1000,
        num_validation_images=100,
        num_classes=num_classes,
        num_parameters=1,
        torch_version="2",
        syncbn_version="0",
    )


def test_a_report_joins_the_job_with_both_verdicts() -> None:
    job = _job(JobState.SUCCEEDED, started_at=_BIRTH, finished_at=_BIRTH + timedelta(seconds=90))
    late, early = _evaluation(250, 0.2), _evaluation(100, 0.0)
    report = report_job(JobRecord(job, 2, _losses(*[0.5] * 250), [late, early]))
    assert (report.job_id, report.name, report.state, report.complete) == ("job_1", "report", JobState.SUCCEEDED, True)
    assert (report.num_attempts, report.num_steps, report.training_s) == (2, 250, 90.0)
    assert report.normalization is Normalization.LOCAL
    assert report.convergence.verdict is ConvergenceVerdict.PLATEAU
    assert report.drift.colour is DriftColour.RED
    assert report.evaluations == (early, late)
    assert report.last_evaluation == late
    assert JobReport.model_validate_json(report.model_dump_json()) == report


def test_a_job_that_never_ran_has_a_report_too() -> None:
    report = report_job(JobRecord(_job(JobState.QUEUED), 0, _losses()))
    assert not report.complete
    assert (report.num_steps, report.training_s, report.last_evaluation) == (0, None, None)
    assert report.convergence.verdict is ConvergenceVerdict.UNDECIDED
    assert report.drift.colour is DriftColour.UNDECIDED


def test_a_running_job_counts_up_to_its_last_heartbeat() -> None:
    job = _job(JobState.RUNNING, started_at=_BIRTH, heartbeat_at=_BIRTH + timedelta(seconds=7))
    assert report_job(JobRecord(job, 1, _losses(1.0))).training_s == 7.0


@pytest.mark.parametrize(
    ("data", "num_classes", "verdict"),
    [
        ("builtin:digits", None, ConvergenceVerdict.DIVERGED),
        ("idx:/images", None, ConvergenceVerdict.UNDECIDED),
        ("idx:/images", 10, ConvergenceVerdict.DIVERGED),
        ("idx:/images", 1000, ConvergenceVerdict.UNDECIDED),
    ],
)
def test_guessing_is_placed_by_the_number_of_classes(
    data: str, num_classes: int | None, verdict: ConvergenceVerdict
) -> None:
    report = report_job(JobRecord(_job(JobState.RUNNING, data), 1, _losses(*[5.0] * 100), start=_start(num_classes)))
    assert report.convergence.verdict is verdict


def test_a_thinned_series_is_said_to_be_thinned() -> None:
    report = report_job(JobRecord(_job(JobState.RUNNING), 1, _losses(*[0.5] * 250, downsampled="min_max")))
    assert "thinned by min_max" in report.convergence.sentence
