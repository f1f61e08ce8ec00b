"""A job as it happens: server-sent events that a reader can leave and take up again."""

import time
from collections.abc import Collection, Sequence

from anyio.to_thread import run_sync
from fastapi import APIRouter

from service.api.event_stream import EventStream, message
from service.api.feed import Followed
from service.api.following import Records, follow
from service.api.items import After, LastEventId, Types
from service.api.parts import ExistingJob, PartsOf
from service.api.problems import answers
from service.jobs import JobEvent, Topic
from service.store import Glance, JobStore

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"], responses=answers(400, 401, 404, 422, 503))

_PROGRESS_EVERY_S = 0.5
_EVENTS_A_READ = 200
_CHARS_A_READ = 2**18
"""So much of a long history is in memory for each reader that is still to be told of it."""


@router.get("/stream", summary="Follow a job", response_class=EventStream)
async def follow_job(
    job: ExistingJob, parts: PartsOf, after: After = 0, types: Types = None, last_event_id: LastEventId = None
) -> EventStream:
    """Tell all events after `after`, then new ones as they come, until the job is over.

    Messages are `event` (an event of the job; its `id` is the event's `seq`), `progress` (whenever it changed, at
    most twice a second; has no id and is not told again), and `end` (the job, terminal), after which the stream
    closes. A stream that closes without `end` is to be taken up again with `Last-Event-ID`. Where that is greater
    than the newest `seq`, as after a restored backup, the first message is `reset`: everything is told again, from
    its `next_seq` on. A reader that takes nothing for a while is cut off; it loses nothing by that.
    """
    seen = after if last_event_id is None else last_event_id
    return EventStream(follow(parts, job.id, seen, _Events(parts.store, job.id, types or (Topic.EVERYTHING,))))


class _Events(Records[JobEvent]):
    """The job's events, of some types or of all; beside them its progress, not too often, the last one in any case."""

    def __init__(self, store: JobStore, job_id: str, types: Collection[Topic]) -> None:
        self._store = store
        self._job_id = job_id
        self._types = None if Topic.EVERYTHING in types else frozenset(types)
        self._progress_json: str | None = None
        self._progress_at = time.monotonic()

    def last_seq(self, glance: Glance) -> int:
        return glance.num_events

    async def after(self, followed: Followed, seen: int) -> Sequence[JobEvent]:
        events = followed.after(seen)
        return await run_sync(self._stored_after, seen) if events is None else events

    def message(self, record: JobEvent) -> bytes:
        wanted = self._types is None or record.type in self._types
        return message("event", record, record.seq) if wanted else b""

    def beside(self, glance: Glance) -> bytes:
        progress = glance.progress if glance.progress_json != self._progress_json else None
        if progress is None or not (glance.state.terminal or time.monotonic() >= self._progress_at):
            return b""
        self._progress_json, self._progress_at = glance.progress_json, time.monotonic() + _PROGRESS_EVERY_S
        return message("progress", progress)

    def beside_in_s(self, glance: Glance) -> float:
        if glance.progress_json in (None, self._progress_json):
            return super().beside_in_s(glance)
        return self._progress_at - time.monotonic()

    def _stored_after(self, seen: int) -> Sequence[JobEvent]:
        return self._store.events(self._job_id, seen, _EVENTS_A_READ, enough_chars=_CHARS_A_READ)
