"""What a job has told, over HTTP: metrics, drift, events, logs."""

from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import PlainTextResponse

from service.api.items import MAX_COUNT, After, Items, Limit
from service.api.parts import ExistingJob, Store
from service.api.problems import answers
from service.errors import NotFound
from service.jobs import Drift, JobEvent, LogRecord, MetricSeries

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"], responses=answers(400, 401, 404, 422, 503))

_Step = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]


@router.get("/metrics", summary="List metrics")
def metric_names(job_id: str, store: Store) -> Items[str]:
    """The names of the metrics that the job has points of."""
    return Items[str](items=tuple(store.metric_names(job_id)))


@router.get("/metrics/{name:path}", summary="Read a metric")
def read_metric(
    job_id: str,
    name: str,
    store: Store,
    rank: Annotated[int | None, Query(ge=0, le=MAX_COUNT, description="One rank; else the mean over ranks.")] = None,
    first_step: _Step = None,
    last_step: _Step = None,
    max_points: Annotated[int, Query(ge=10, le=5000)] = 500,
) -> MetricSeries:
    """One metric over steps. Where there are more points than asked for, extremes and non-finite values stay."""
    return store.metric(job_id, name, rank=rank, first_step=first_step, last_step=last_step, max_points=max_points)


@router.get("/drift", summary="Read drift")
def read_drift(
    job_id: str,
    store: Store,
    layer: Annotated[str | None, Query(description="Only this layer, by its module path.")] = None,
) -> Items[Drift]:
    """Drift of the running statistics, one entry for each measured step."""
    measured = store.drift(job_id)
    if layer is None or not measured:
        return Items[Drift](items=tuple(measured))
    names = list(dict.fromkeys(found.layer for drift in measured for found in drift.layers))
    if layer not in names:
        raise NotFound(f"{job_id} has no BatchNorm layer {layer!r}; it has {', '.join(names) or 'none'}")
    chosen = (drift.model_copy(update={"layers": _only(drift, layer)}) for drift in measured)
    return Items[Drift](items=tuple(chosen))


def _only(drift: Drift, layer: str) -> tuple[object, ...]:
    return tuple(found for found in drift.layers if found.layer == layer)


@router.get("/events", summary="Read events")
def read_events(job_id: str, store: Store, after: After = 0, limit: Limit = 500) -> Items[JobEvent]:
    """What happened to the job, in order. `/stream` tells the same as it happens."""
    return Items[JobEvent](items=tuple(store.events(job_id, after, limit)))


@router.get(
    "/logs",
    summary="Read logs",
    response_model=Items[LogRecord],
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def read_logs(
    job: ExistingJob,
    store: Store,
    after: After = 0,
    limit: Limit = 500,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Items[LogRecord] | PlainTextResponse:
    """The job's log lines, in order; as plain text where `Accept` asks for it."""
    found = store.logs(job.id, after, limit)
    if accept.partition(";")[0].strip() == "text/plain":
        return PlainTextResponse("".join(_line(record) for record in found))
    return Items[LogRecord](items=tuple(found))


def _line(record: LogRecord) -> str:
    who = f"rank {record.rank}" if record.rank >= 0 else "runner"
    return f"{record.time:%Y-%m-%dT%H:%M:%S.%fZ} attempt {record.attempt} {who} {record.level}: {record.text}\n"
