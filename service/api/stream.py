"""A job as it happens: server-sent events that a reader can leave and take up again."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.feed import EVENTS_A_LOOK, Followed
from service.api.items import MAX_COUNT, After
from service.api.parts import ExistingJob, PartsOf
from service.api.problems import answers
from service.jobs import JobEvent, Progress
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"], responses=answers(400, 401, 404, 422, 503))

_PROGRESS_EVERY_S = 0.5


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
    async with parts.feed.follow(job.id) as followed:
        while not parts.stopping.is_set():
            glance = followed.glance
            for event in (events := await _events_after(parts.store, job.id, followed, seen)):
                seen = event.seq
                yield ServerSentEvent(event="event", id=str(event.seq), data=event)
            waits_s = progress_at + _PROGRESS_EVERY_S - time.monotonic()
            if glance.progress != progress and (waits_s <= 0 or glance.state.terminal):
                progress, progress_at = glance.progress, time.monotonic()
                yield ServerSentEvent(event="progress", data=progress)
            if events or glance is not followed.glance:
                continue
            if glance.state.terminal:
                yield ServerSentEvent(event="end", data=await run_sync(parts.store.get, job.id))
                return
            await followed.wait(max(waits_s, 0) if glance.progress != progress else None)


async def _events_after(store: JobStore, job_id: str, followed: Followed, seen: int) -> Sequence[JobEvent]:
    events = followed.after(seen)
    return await run_sync(store.events, job_id, seen, EVENTS_A_LOOK) if events is None else events
