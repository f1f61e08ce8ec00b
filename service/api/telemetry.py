"""What a job has told, over HTTP: metrics, drift, events."""

from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Query

from service.api.items import MAX_COUNT, After, Items, Limit, Types
from service.api.parts import Store
from service.api.problems import answers
from service.errors import NotFound
from service.jobs import Drift, JobEvent, MetricSeries, Topic

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"], responses=answers(400, 401, 404, 422, 503))

_Step = Annotated[int | None, Query(ge=0, le=MAX_COUNT)]


@router.get("/metrics", summary="List metrics", responses=answers(410))
def metric_names(job_id: str, store: Store) -> Items[str]:
    """The names of the metrics that the job has points of."""
    return Items[str](items=tuple(store.metric_names(job_id)))


@router.get("/metrics/{name:path}", summary="Read a metric", responses=answers(410))
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


@router.get("/drift", summary="Read drift", responses=answers(410))
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
def read_events(
    job_id: str, store: Store, after: After = 0, limit: Limit = 500, types: Types = None
) -> Items[JobEvent]:
    """What happened to the job, in order. `/stream` tells the same as it happens."""
    return Items[JobEvent](items=tuple(store.events(job_id, after, limit, _wanted(types))))


def _wanted(types: Collection[Topic] | None) -> Collection[Topic] | None:
    """The types to look for; None for all."""
    return None if types is None or Topic.EVERYTHING in types else types
