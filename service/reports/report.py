"""Joins what is recorded of a job and what it means into the one page that every reader gets."""

from service.jobs import Convergence, JobReport, JobSpec, MetricSeries
from service.jobs.spec import BUILTIN_DATA
from service.reports.convergence import judge_convergence
from service.reports.drift import judge_drift
from service.reports.record import JobRecord

_NUM_BUILTIN_CLASSES = 10


def report_job(record: JobRecord) -> JobReport:
    """The report on the job of ``record``.

    ``training_s`` counts from the first start to the end or, before that, to the last heartbeat, pauses and retries
    included. Where no rank has said how many classes there are, built-in data sets are known.
    Cost: O(points + evaluations + samples).
    """
    job, losses = record.job, record.losses
    classes = record.start.num_classes if record.start else _classes_of(job.spec)
    convergence = judge_convergence(
        losses.steps,
        losses.values,
        classes,
        warmup_steps=job.spec.schedule.warmup_steps,
        total_steps=record.start.total_steps if record.start else None,
        non_finite=record.non_finite,
    )
    until = job.finished_at or job.heartbeat_at
    ordered = tuple(sorted(record.evaluations, key=lambda e: e.step))
    return JobReport(
        job_id=job.id,
        name=job.spec.name,
        state=job.state,
        normalization=job.spec.normalization,
        complete=job.state.terminal,
        num_steps=max(losses.steps, default=0),
        training_s=max((until - job.started_at).total_seconds(), 0.0) if job.started_at and until else None,
        num_attempts=record.num_attempts,
        convergence=_say_if_thinned(convergence, losses),
        drift=judge_drift(ordered, record.drift, job.spec, num_classes=classes),
        last_evaluation=ordered[-1] if ordered else None,
        evaluations=ordered,
    )


def _classes_of(spec: JobSpec) -> int | None:
    builtin = spec.data in [f"builtin:{name}" for name in BUILTIN_DATA]
    return _NUM_BUILTIN_CLASSES if builtin else None


def _say_if_thinned(convergence: Convergence, losses: MetricSeries) -> Convergence:
    if losses.downsampled is None:
        return convergence
    note = (
        f" (Judged on {len(losses.values)} of {losses.num_points} steps, thinned by {losses.downsampled}; "
        "steps in this sentence count kept points.)"
    )
    return convergence.model_copy(update={"sentence": convergence.sentence + note})
