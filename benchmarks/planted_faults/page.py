"""The page on a job that the service would show for a run, from what the ranks told."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from benchmarks.planted_faults.examinations import Findings
from benchmarks.planted_faults.runs import Told
from benchmarks.planted_faults.scenarios import Scenario
from service.jobs import (
    BatchNormSample,
    CheckpointSaved,
    Drift,
    Evaluation,
    Job,
    JobReport,
    JobState,
    LimitExceeded,
    MetricSeries,
    ModeFault,
    MomentumReplay,
    NonFinite,
    RankStarted,
    StepMetrics,
)
from service.reports import JobRecord, SampledLayers, report_job

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Shown:
    """What there is to judge a run by: the page, the words with which it failed, what was found after it.

    ``seconds`` from the order to the end, of a job of a service.
    """

    scenario: Scenario
    seed: int
    page: JobReport
    failures: tuple[str, ...]
    examined: Findings
    seconds: float | None = None


def shown(told: Told) -> Shown:
    """What the service would show."""
    return Shown(told.scenario, told.seed, page_of(told), told.failures, told.examined)


def page_of(told: Told) -> JobReport:
    """The report; losses are means over ranks, as the service takes them."""
    replays, starts = _of(MomentumReplay, told), _of(RankStarted, told)
    record = JobRecord(
        job=_job(told),
        num_attempts=1,
        losses=_losses(told),
        evaluations=_of(Evaluation, told),
        drift=_of(Drift, told),
        samples=[SampledLayers(1, sample) for sample in _of(BatchNormSample, told)],
        non_finite=[(rank, e) for rank, events in enumerate(told.events) for e in events if isinstance(e, NonFinite)],
        mode_faults=_of(ModeFault, told),
        limits_exceeded=_of(LimitExceeded, told),
        momentum_replay=replays[-1] if replays else None,
        checkpoints=_of(CheckpointSaved, told),
        start=starts[0] if starts else None,
    )
    return report_job(record)


def _of(kind: type[Fact], told: Told) -> list[Fact]:
    return [event for events in told.events for event in events if isinstance(event, kind)]


def _losses(told: Told) -> MetricSeries:
    by_step: dict[int, list[float]] = {}
    for event in _of(StepMetrics, told):
        by_step.setdefault(event.step, []).append(event.loss)
    steps = tuple(sorted(by_step))
    values = tuple(sum(by_step[step]) / len(by_step[step]) for step in steps)
    return MetricSeries(name="training_loss", rank=None, steps=steps, values=values, num_points=len(values))


def _job(told: Told) -> Job:
    then = datetime(2026, 1, 1, tzinfo=UTC)
    fields: dict[str, Any] = {
        "id": "job_1",
        "spec": told.scenario.spec(told.seed),
        "state": JobState.FAILED if any(told.failures) else JobState.SUCCEEDED,
        "version": 1,
        **dict.fromkeys(("created_at", "updated_at", "state_since", "started_at", "finished_at"), then),
    }
    return Job.model_validate(fields)
