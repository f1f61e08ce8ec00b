"""Joins what is recorded of a job and what it means into the one page that every reader gets."""

import math
from collections.abc import Iterator
from itertools import chain

from service.jobs import (
    Attribution,
    Convergence,
    ConvergenceVerdict,
    Evaluation,
    JobFinding,
    JobReport,
    JobSpec,
    MetricSeries,
    TimeToTarget,
)
from service.jobs.spec import BUILTIN_DATA
from service.reports import findings, statistics_findings
from service.reports.attribution import drift_series, first_to_change, sample_series
from service.reports.channels import list_channels
from service.reports.convergence import LossCourse
from service.reports.damage import poor_under_both
from service.reports.drift import judge_drift
from service.reports.momentum import judge_momentum
from service.reports.other_data import of_data
from service.reports.overfitting import judge_overfitting
from service.reports.ranks import judge_ranks
from service.reports.record import JobRecord
from service.reports.shipping import judge_checkpoint
from service.reports.staleness import judge_staleness
from service.reports.target import reach_target

_NUM_BUILTIN_CLASSES = 10
_LOOKED_AT = 60
"""Samples before a run diverged, of each kind, in which the layer to change first is looked for."""


def report_job(record: JobRecord) -> JobReport:
    """The report on the job of ``record``.

    ``training_s`` counts from the first start to the end or, before that, to the last heartbeat, pauses and retries
    included. Where no rank has said how many classes there are, built-in data sets are known.
    Cost: O(points + evaluations + samples), and 0.2 s for the law of the loss.
    """
    job, losses, spec = record.job, record.losses, record.job.spec
    classes = record.start.num_classes if record.start else _classes_of(spec)
    ordered = tuple(sorted(record.evaluations, key=lambda e: e.step))
    course = _course(record, classes)
    convergence = course.verdict(record.non_finite)
    drift = judge_drift(ordered, record.drift, spec, num_classes=classes)
    until = job.finished_at or job.heartbeat_at
    report = JobReport(
        job_id=job.id,
        name=spec.name,
        state=job.state,
        normalization=spec.normalization,
        complete=job.state.terminal,
        num_steps=max(losses.steps, default=0),
        training_s=max((until - job.started_at).total_seconds(), 0.0) if job.started_at and until else None,
        num_attempts=record.num_attempts,
        drift=drift,
        stale=judge_staleness(record.drift, drift.colour, spec),
        ranks=judge_ranks(record.samples[-1].sample if record.samples else None, record.drift, spec),
        findings=(),
        advice=(),
        convergence=_say_if_thinned(convergence, losses),
        overfitting=judge_overfitting(ordered),
        decay=course.decay(),
        target=_target(record, ordered),
        channels=list_channels(record.samples),
        momentum=judge_momentum(record.momentum_replay),
        checkpoint=judge_checkpoint(record.checkpoints),
        first_to_change=_first_to_change(record, convergence),
        last_evaluation=ordered[-1] if ordered else None,
        evaluations=ordered,
    )
    found = findings.in_order(_find(report, record, classes))
    return report.model_copy(update={"findings": found, "advice": findings.advice_of(found)})


def _find(report: JobReport, record: JobRecord, classes: int | None) -> Iterator[JobFinding]:
    spec, last = record.job.spec, report.last_evaluation
    judged = report.complete and last is not None and math.isfinite(last.population.loss)
    poor = judged and last is not None and poor_under_both(last, classes)
    return chain(
        findings.of_losses(report.convergence, report.overfitting),
        findings.of_modes(record.mode_faults),
        statistics_findings.of_ranks(report.ranks, record.drift, spec),
        of_data(last),
        statistics_findings.of_damage(report.drift, last, spec),
        statistics_findings.of_staleness(report.stale, report.momentum, spec),
        statistics_findings.of_momentum(report.momentum, report.drift.colour),
        statistics_findings.of_batch(spec, report.drift.colour, poor=poor),
        statistics_findings.of_network(last, poor=poor),
        findings.of_channels(report.channels),
        findings.of_limits(record.limits_exceeded),
        findings.of_checkpoint(report.checkpoint, report.drift.colour),
        findings.of_change(report.first_to_change),
    )


def _course(record: JobRecord, classes: int | None) -> LossCourse:
    """The losses in order of their steps; of a step that comes twice the later one."""
    course = LossCourse(
        classes,
        warmup_steps=record.job.spec.schedule.warmup_steps,
        total_steps=record.start.total_steps if record.start else None,
    )
    latest = dict(zip(record.losses.steps, record.losses.values, strict=True))
    steps = sorted(latest)
    course.add(steps, [latest[step] for step in steps])
    return course


def _target(record: JobRecord, evaluations: tuple[Evaluation, ...]) -> TimeToTarget | None:
    spec = record.job.spec
    if spec.target is None:
        return None
    return reach_target(evaluations, spec.target, images_per_step=spec.global_batch_size, seconds=record.seconds)


def _first_to_change(record: JobRecord, convergence: Convergence) -> Attribution | None:
    if convergence.verdict is not ConvergenceVerdict.DIVERGED:
        return None
    last_step = convergence.first_non_finite_step
    until = math.inf if last_step is None else last_step
    drift = [sample for sample in record.drift if sample.step <= until]
    samples = [taken.sample for taken in record.samples if taken.sample.step <= until]
    series = drift_series(drift[-_LOOKED_AT:]) + sample_series(samples[-_LOOKED_AT:])
    return first_to_change(series, last_step=last_step)


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
