"""Events: what happened to a job, numbered per job from 1 without holes."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from service.jobs import JobEvent
from service.store.lanes import anyone_listens, extend_lanes, is_told
from service.store.schema import events, jobs

STATE_CHANGED = "state_changed"
PHASE_CHANGED = "phase_changed"
CHECKPOINT_REQUESTED = "checkpoint_requested"
RESIZED = "resized"
CANCEL_FORCED = "cancel_forced"
PRIORITY_CHANGED = "priority_changed"


@dataclass(frozen=True)
class NewEvent:
    """An event that has no number yet; ``body`` is a JSON object."""

    time: datetime
    type: str
    body: str
    attempt: int | None = None
    rank: int | None = None


def append_events(connection: Connection, job_id: str, new: Sequence[NewEvent]) -> None:
    """Number the events and store them, and let the webhooks be told that listen.

    The job's row stays locked until the transaction ends.
    """
    if not new:
        return
    counted = update(jobs).where(jobs.c.id == job_id).values(num_events=jobs.c.num_events + len(new))
    asked = counted.returning(jobs.c.num_events, jobs.c.owner, anyone_listens().label("listened"))
    last, owner, listened = connection.execute(asked).one()
    first = last - len(new) + 1
    rows = [
        {
            "job_id": job_id,
            "seq": seq,
            "time": e.time,
            "type": e.type,
            "attempt": e.attempt,
            "rank": e.rank,
            "body": e.body,
        }
        for seq, e in enumerate(new, start=first)
    ]
    connection.execute(insert(events), rows)
    if listened:
        numbered = [(seq, e.type) for seq, e in enumerate(new, start=first) if is_told(e.type, e.body)]
        extend_lanes(connection, job_id, owner, numbered)


def events_after(
    connection: Connection,
    job_id: str,
    after_seq: int,
    limit: int,
    types: Collection[str] | None = None,
    enough_chars: int | None = None,
) -> list[JobEvent]:
    """The next events in order, of some types or of all; no more once their bodies have so many letters together."""
    query = select(events).where(events.c.job_id == job_id, events.c.seq > after_seq).order_by(events.c.seq)
    if types is not None:
        query = query.where(events.c.type.in_(types))
    found: list[JobEvent] = []
    num_chars = 0
    for row in connection.execute(query.limit(limit)):
        found.append(
            JobEvent(
                seq=row.seq, time=row.time, type=row.type, attempt=row.attempt, rank=row.rank, body=json.loads(row.body)
            )
        )
        num_chars += len(row.body)
        if enough_chars is not None and num_chars >= enough_chars:
            break
    return found


def bodies_of_type(connection: Connection, job_id: str, event_type: str) -> list[tuple[int, str]]:
    """Attempt (0 for none) and JSON body of every event of one type, in order."""
    query = select(events.c.attempt, events.c.body).where(events.c.job_id == job_id, events.c.type == event_type)
    return [(row.attempt or 0, row.body) for row in connection.execute(query.order_by(events.c.seq))]
