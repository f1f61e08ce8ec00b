"""A job's log over HTTP: read by pages, downloaded whole, or followed line by line as it is written."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header
from fastapi.responses import PlainTextResponse, StreamingResponse

from service.api.event_stream import EventStream, message
from service.api.feed import Followed
from service.api.following import Records, follow
from service.api.items import After, Items, LastEventId, Limit
from service.api.parts import ExistingJob, PartsOf, Store
from service.api.problems import PLAIN_TEXT, answers
from service.jobs import LogRecord
from service.store import Glance, JobStore

router = APIRouter(prefix="/v1/jobs/{job_id}/logs", tags=["telemetry"], responses=answers(400, 401, 404, 410, 422, 503))

_LINES_A_LOOK = 500


def _require_kept(job_id: str, store: Store) -> None:
    """Raise NotFound or Gone before an answer is begun that could not tell of it any more."""
    store.logs(job_id, limit=1)


@router.get("", summary="Read logs", response_model=Items[LogRecord], responses=PLAIN_TEXT)
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


@router.get(
    "/download",
    summary="Download the log",
    response_class=PlainTextResponse,
    dependencies=[Depends(_require_kept)],
    responses=PLAIN_TEXT,
)
def download_logs(job: ExistingJob, store: Store) -> StreamingResponse:
    """The whole log as it is now, as a text file."""
    headers = {"Content-Disposition": f'attachment; filename="{job.id}.log"'}
    return StreamingResponse(_all_lines(store, job.id), media_type="text/plain; charset=utf-8", headers=headers)


@router.get(
    "/stream",
    summary="Follow the log",
    response_class=EventStream,
    dependencies=[Depends(_require_kept)],
)
async def follow_logs(
    job: ExistingJob, parts: PartsOf, after: After = 0, last_event_id: LastEventId = None
) -> EventStream:
    """Tell all lines after `after`, then new ones as they come, until the job is over.

    Messages are `log` (a line; its `id` is its `seq`), `end` (the job, terminal), after which the stream closes, and
    `reset` in the place of the first where `Last-Event-ID` is greater than the newest `seq`.
    """
    seen = after if last_event_id is None else last_event_id
    return EventStream(follow(parts, job.id, seen, _Lines(parts.store, job.id)))


class _Lines(Records[LogRecord]):
    """The lines of the job's log."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._store = store
        self._job_id = job_id

    def last_seq(self, glance: Glance) -> int:
        return glance.num_logs

    async def after(self, followed: Followed, seen: int) -> Sequence[LogRecord]:
        if seen >= followed.glance.num_logs:
            return ()
        return await run_sync(self._store.logs, self._job_id, seen, _LINES_A_LOOK)

    def message(self, record: LogRecord) -> bytes:
        return message("log", record, record.seq)


def _all_lines(store: JobStore, job_id: str) -> Iterator[str]:
    seen = 0
    while records := store.logs(job_id, seen, 1000):
        seen = records[-1].seq
        yield "".join(_line(record) for record in records)


def _line(record: LogRecord) -> str:
    who = f"rank {record.rank}" if record.rank >= 0 else "runner"
    return f"{record.time:%Y-%m-%dT%H:%M:%S.%fZ} attempt {record.attempt} {who} {record.level}: {record.text}\n"
