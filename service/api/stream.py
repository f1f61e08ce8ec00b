"""A job as it happens: server-sent events that a reader can leave and take up again."""

import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.items import MAX_COUNT, After
from service.api.parts import ExistingJob, PartsOf
from service.api.problems import answers
from service.jobs import Job, JobEvent, Progress
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"], responses=answers(400, 401, 404, 422, 503))

_LOOK_EVERY_S = 0.25
_PROGRESS_EVERY_S = 0.5
_EVENTS_A_LOOK = 200


@router.get("/stream", summary="Follow a job", response_class=EventSourceResponse)
async def follow_job(
    job: ExistingJob,
    parts: PartsOf,
    after: After = 0,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_COUNT, description="Wins over `after`.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Tell all events after `after`, then new ones as they come, until the job is over.

    Messages are `event` (an event of the job; its `id` is the event's `seq`), `progress` (whenever it changed, at
    most twice a second; has no id and is not told again), and `end` (the job, terminal), after which the stream
    closes. A stream that closes without `end` is to be taken up again with `Last-Event-ID`.
    """
    seen = after if last_event_id is None else last_event_id
    progress: Progress | None = None
    progress_at = -_PROGRESS_EVERY_S
    while not parts.stopping.is_set():
        # The job is read before its events: once it is terminal, no event of it is yet to come.
        job, events = await run_sync(_look, parts.store, job.id, seen)
        for event in events:
            seen = event.seq
            yield ServerSentEvent(event="event", id=str(event.seq), data=event)
        due = time.monotonic() - progress_at >= _PROGRESS_EVERY_S
        if job.progress != progress and (due or job.state.terminal):
            progress, progress_at = job.progress, time.monotonic()
            yield ServerSentEvent(event="progress", data=progress)
        if not events and job.state.terminal:
            yield ServerSentEvent(event="end", data=job)
            return
        if len(events) < _EVENTS_A_LOOK and not job.state.terminal:
            await anyio.sleep(_LOOK_EVERY_S)


def _look(store: JobStore, job_id: str, seen: int) -> tuple[Job, list[JobEvent]]:
    return store.get(job_id), store.events(job_id, seen, _EVENTS_A_LOOK)
