"""What the jobs' records mean: the report on a job, its BatchNorm layers over time, several jobs beside each other."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.auth import Asker, visible_owner
from service.api.items import MAX_COUNT
from service.api.parts import ExistingJob, Store
from service.api.problems import answers
from service.errors import NotFound
from service.jobs import (
    ComparedMetric,
    Job,
    JobReport,
    LayerHistory,
    LimitExceeded,
    ModeFault,
    MomentumReplay,
    NonFinite,
    Principal,
    SideBySide,
)
from service.reports import JobRecord, SampledLayers, report_job
from service.reports.groups import put_side_by_side
from service.store import JobStore

router = APIRouter(prefix="/v1", tags=["reports"])

_EXACT_STEPS = 100_000
_COMPARED_STEPS = 20_000
"""Steps up to which the training loss is judged exactly; where many jobs are, longer ones in means of some steps."""

_Step = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]
_Patterns = Annotated[
    list[Annotated[str, Query(max_length=200)]] | None,
    Query(max_length=32, description="Only these numbers, such as `drift/rms_mean_shift` or `sample/*`; repeatable."),
]


@router.get("/jobs/{job_id}/report", summary="Report on a job", responses=answers(400, 401, 404, 410, 503))
def report(job: ExistingJob, store: Store) -> JobReport:
    """Whether the job converges, whether its running statistics can be trusted, and what to change."""
    return report_job(_record_of(store, job, _EXACT_STEPS))


@router.get("/jobs/{job_id}/bn", summary="Read BatchNorm layers", responses=answers(400, 401, 404, 410, 422, 503))
def read_layers(
    job_id: str,
    store: Store,
    layer: Annotated[str, Query(max_length=500, description="Only these layers; `*` is any letters.")] = "*",
    metric: _Patterns = None,
    first_step: _Step = None,
    last_step: _Step = None,
    max_points: Annotated[int, Query(ge=10, le=5000, description="The most points of one series.")] = 500,
) -> LayerHistory:
    """Numbers of each layer over steps. Where there are more than asked for, extremes and non-finite values stay."""
    return store.layer_history(
        job_id,
        layer=layer,
        metrics=metric or ["*"],
        first_step=first_step,
        last_step=last_step,
        max_points=max_points,
    )


@router.get("/jobs:compare", summary="Compare jobs", responses=answers(400, 401, 404, 410, 422, 503))
def compare_jobs(
    asker: Asker,
    store: Store,
    job: Annotated[list[str], Query(min_length=2, max_length=64, description="The jobs' ids; repeat it for each.")],
    metric: Annotated[ComparedMetric, Query(description="The score to compare.")] = ComparedMetric.ACCURACY,
) -> SideBySide:
    """The jobs' reports, and which settings did better over seeds, with exact p. Runs that prove nothing say why."""
    found = [_visible_job(store, job_id, asker) for job_id in dict.fromkeys(job)]
    records = [_record_of(store, one, _COMPARED_STEPS) for one in found]
    return put_side_by_side(records, metric)


def _visible_job(store: JobStore, job_id: str, asker: Principal) -> Job:
    job = store.get(job_id)
    if visible_owner(asker) not in (None, job.owner):
        raise NotFound(f"there is no job {job_id}")  # the same words as for one that does not exist
    return job


def _record_of(store: JobStore, job: Job, exact_steps: int) -> JobRecord:
    """All that the store knows of the job."""
    losses = store.training_loss(job.id, exact_steps)
    replays = store.facts(job.id, MomentumReplay)
    return JobRecord(
        job=job,
        num_attempts=job.attempt,
        losses=losses,
        evaluations=store.evaluations(job.id),
        drift=store.drift(job.id),
        samples=[SampledLayers(attempt, sample) for attempt, sample in store.samples(job.id)],
        non_finite=store.facts(job.id, NonFinite),
        mode_faults=[fault for _, fault in store.facts(job.id, ModeFault)],
        limits_exceeded=[limit for _, limit in store.facts(job.id, LimitExceeded)],
        momentum_replay=replays[-1][1] if replays else None,
        checkpoints=store.checkpoints(job.id),
        start=store.start_of(job.id),
        seconds=_seconds(store, job),
    )


def _seconds(store: JobStore, job: Job) -> dict[int, float]:
    """How long after the job's start each evaluation was."""
    if job.started_at is None:
        return {}
    return {step: (at - job.started_at).total_seconds() for step, at in store.evaluated_at(job.id).items()}
