"""Pages of jobs, newest first. A cursor names the last job seen, so new jobs never shift a page."""

import base64
import binascii
from collections.abc import Collection
from datetime import UTC, datetime

from sqlalchemy import Connection, and_, or_, select

from service.errors import FieldProblem, InvalidRequest
from service.jobs import Job, JobPage, JobState
from service.store.jobs import job_of_row
from service.store.schema import jobs


def job_page(
    connection: Connection,
    limit: int,
    cursor: str | None,
    states: Collection[JobState] | None,
    name: str | None,
    now: datetime,
    *,
    owner: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> JobPage:
    """At most ``limit`` jobs in any of ``states``, exactly of that ``name`` and ``owner``.

    The span of time includes ``created_after`` and excludes ``created_before``, so that spans can follow each other.

    Raises: InvalidRequest where the cursor was not made here.
    """
    query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1)
    if states is not None:
        query = query.where(jobs.c.state.in_(sorted(states)))
    if name is not None:
        query = query.where(jobs.c.name == name)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if created_after is not None:
        query = query.where(jobs.c.created_at >= created_after)
    if created_before is not None:
        query = query.where(jobs.c.created_at < created_before)
    if cursor is not None:
        created_at, job_id = _parse(cursor)
        same_time = and_(jobs.c.created_at == created_at, jobs.c.id < job_id)
        query = query.where(or_(jobs.c.created_at < created_at, same_time))
    found = [job_of_row(row, now) for row in connection.execute(query)]
    more = len(found) > limit
    return JobPage(items=tuple(found[:limit]), next_cursor=_cursor(found[limit - 1]) if more else None)


def _cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(f"{job.created_at.isoformat()} {job.id}".encode()).decode()


def _parse(cursor: str) -> tuple[datetime, str]:
    try:
        time, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        return datetime.fromisoformat(time).astimezone(UTC), job_id
    except (ValueError, binascii.Error, OverflowError) as error:
        text = "is not a cursor of this service; take next_cursor from a page, or leave it out"
        raise InvalidRequest([FieldProblem("/cursor", "cursor_invalid", text)]) from error
