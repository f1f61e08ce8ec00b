"""Puts jobs beside each other: which share everything but the seed, and which settings did better over seeds."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from service.jobs import (
    ComparedGroup,
    ComparedMetric,
    Comparison,
    Job,
    JobState,
    LeftOut,
    Reason,
    SideBySide,
)
from service.reports.comparison import RunScore, compare, final_score
from service.reports.record import JobRecord
from service.reports.report import report_job

_BESIDE_THE_POINT = frozenset({"name", "seed", "priority", "after", "timeouts", "retries"})
"""Fields of a spec that do not change what a run computes, and the seed, over which runs are compared."""

_Groups = dict[str, list[JobRecord]]


def put_side_by_side(records: Sequence[JobRecord], metric: ComparedMetric) -> SideBySide:
    """The reports on all jobs, in their order, and each group of settings against each other over seeds.

    A run counts once it is over: one that diverged has no score, others that did not succeed are left out. So are
    all runs but the newest of one seed and one group: a repeated run is no further evidence. Cost: that of a report
    on each job.
    """
    counted, left_out = _judge_runs(records)
    groups = _grouped(counted)
    scores = {name: [_score(record, metric) for record in found] for name, found in groups.items()}
    comparisons = compare(scores, metric)
    return SideBySide(
        reports=tuple(report_job(record).model_copy(update={"evaluations": ()}) for record in records),
        groups=tuple(ComparedGroup(name=name, job_ids=_ids(found)) for name, found in groups.items()),
        left_out=left_out,
        comparisons=comparisons,
        sentence=_sentence(groups, comparisons),
    )


def _judge_runs(records: Sequence[JobRecord]) -> tuple[list[JobRecord], tuple[LeftOut, ...]]:
    """The runs that count, in their order, and why the others do not."""
    newest: dict[tuple[str, int], str] = {}
    for record in sorted(records, key=lambda record: record.job.created_at):
        if _why_unfinished(record.job) is None:
            newest[_settings(record.job), record.job.spec.seed] = record.job.id
    counted: list[JobRecord] = []
    left_out: list[LeftOut] = []
    for record in records:
        job = record.job
        why = _why_unfinished(job)
        if why is None and (counts := newest[_settings(job), job.spec.seed]) != job.id:
            why = f"it repeats {counts}, of the same settings and seed, and is no further evidence"
        if why is None:
            counted.append(record)
        else:
            left_out.append(LeftOut(job_id=job.id, why=why))
    return counted, tuple(left_out)


def _why_unfinished(job: Job) -> str | None:
    if job.state is JobState.SUCCEEDED or _diverged(job):
        return None
    reason = f" ({job.reason})" if job.reason else ""
    return f"it is {job.state}{reason}: only a run that is over has a last score"


def _diverged(job: Job) -> bool:
    return job.state is JobState.FAILED and job.reason is Reason.DIVERGED


def _score(record: JobRecord, metric: ComparedMetric) -> RunScore:
    score = math.nan if _diverged(record.job) else final_score(record.evaluations, metric)
    return RunScore(seed=record.job.spec.seed, score=math.nan if score is None else score)


def _settings(job: Job) -> str:
    return json.dumps(job.spec.model_dump(mode="json", exclude=set(_BESIDE_THE_POINT)), sort_keys=True)


def _grouped(records: Sequence[JobRecord]) -> _Groups:
    """The runs by the name of their settings, groups in order of appearance."""
    by_settings: dict[str, list[JobRecord]] = {}
    for record in records:
        by_settings.setdefault(_settings(record.job), []).append(record)
    fields = [dict(_flat(json.loads(settings))) for settings in by_settings]
    differing = sorted({path for some in fields for path in some if len({repr(f.get(path)) for f in fields}) > 1})
    names = [", ".join(f"{path}={some[path]}" for path in differing if path in some) for some in fields]
    return {name or "all": found for name, found in zip(names, by_settings.values(), strict=True)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _ids(records: Sequence[JobRecord]) -> tuple[str, ...]:
    return tuple(record.job.id for record in sorted(records, key=lambda record: record.job.spec.seed))


def _sentence(groups: _Groups, comparisons: Sequence[Comparison]) -> str:
    if not groups:
        return "None of these runs is over, so there is nothing to compare yet."
    if len(groups) == 1:
        return "All runs that count differ in their seeds alone: there are no settings to compare."
    better = sum(comparison.verdict != "undecided" for comparison in comparisons)
    return f"{len(groups)} settings, {len(comparisons)} comparisons, of which {better} found one of the two better."
