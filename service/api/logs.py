"""A job's log over HTTP: read by pages, downloaded whole, or followed line by line as it is written."""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.items import MAX_COUNT, After, Items, Limit
from service.api.parts import ExistingJob, PartsOf, Store
from service.api.problems import Answers, answers
from service.jobs import LogRecord
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs/{job_id}/logs", tags=["telemetry"], responses=answers(400, 401, 404, 410, 422, 503))

_TEXT: Answers = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
_LINES_A_LOOK = 500


def _require_kept(job_id: str, store: Store) -> None:
    """Raise NotFound or Gone before an answer is begun that could not tell of it any more."""
    store.logs(job_id, limit=1)


@router.get("", summary="Read logs", response_model=Items[LogRecord], responses=_TEXT)
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
    responses=_TEXT,
)
def download_logs(job: ExistingJob, store: Store) -> StreamingResponse:
    """The whole log as it is now, as a text file."""
    headers = {"Content-Disposition": f'attachment; filename="{job.id}.log"'}
    return StreamingResponse(_all_lines(store, job.id), media_type="text/plain; charset=utf-8", headers=headers)


@router.get(
    "/stream",
    summary="Follow the log",
    response_class=EventSourceResponse,
    dependencies=[Depends(_require_kept)],
)
async def follow_logs(
    job: ExistingJob,
    parts: PartsOf,
    after: After = 0,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_COUNT, description="Wins over `after`.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Tell all lines after `after`, then new ones as they come, until the job is over.

    Messages are `log` (a line; its `id` is its `seq`) and `end` (the job, terminal), after which the stream closes.
    """
    seen = after if last_event_id is None else last_event_id
    async with parts.feed.follow(job.id) as followed:
        while not parts.stopping.is_set():
            glance = followed.glance
            lines = await run_sync(parts.store.logs, job.id, seen, _LINES_A_LOOK) if seen < glance.num_logs else []
            for line in lines:
                seen = line.seq
                yield ServerSentEvent(event="log", id=str(line.seq), data=line)
            if lines or glance is not followed.glance:
                continue
            if glance.state.terminal:
                yield ServerSentEvent(event="end", data=await run_sync(parts.store.get, job.id))
                return
            await followed.wait(None)


def _all_lines(store: JobStore, job_id: str) -> Iterator[str]:
    seen = 0
    while records := store.logs(job_id, seen, 1000):
        seen = records[-1].seq
        yield "".join(_line(record) for record in records)


def _line(record: LogRecord) -> str:
    who = f"rank {record.rank}" if record.rank >= 0 else "runner"
    return f"{record.time:%Y-%m-%dT%H:%M:%S.%fZ} attempt {record.attempt} {who} {record.level}: {record.text}\n"
