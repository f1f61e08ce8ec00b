"""Pages of jobs, newest first. A cursor names the last job seen, so new jobs never shift a page."""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, and_, or_, select

from service.jobs import JobPage, JobState
from service.store.cursors import Cursors
from service.store.jobs import job_of_row
from service.store.schema import jobs


def job_page(
    connection: Connection,
    cursors: Cursors,
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

    Raises: InvalidRequest where the cursor was not made here, or for other filters.
    """
    filters = {
        "list": "jobs",
        "states": None if states is None else sorted(states),
        "name": name,
        "owner": owner,
        "after": created_after,
        "before": created_before,
    }
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
        time, job_id = cursors.open(cursor, filters)
        created_at = datetime.fromisoformat(time)
        same_time = and_(jobs.c.created_at == created_at, jobs.c.id < job_id)
        query = query.where(or_(jobs.c.created_at < created_at, same_time))
    found = [job_of_row(row, now) for row in connection.execute(query)]
    if len(found) <= limit:
        return JobPage(items=tuple(found))
    last = found[limit - 1]
    return JobPage(
        items=tuple(found[:limit]), next_cursor=cursors.seal([last.created_at.isoformat(), last.id], filters)
    )
