"""What webhooks are still to be told: for each webhook and job one lane, in which one event waits behind the other.

A lane is written in the transaction that stores its events, so no event is ever missed, whatever ends in between, and
finding what is new costs nothing of the number of jobs and events there are. It ends when its last event is told.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from service.errors import NotFound
from service.jobs import JobEvent, MessageJob, Role, Topic, Webhook, WebhookState
from service.store.principals import get_principal
from service.store.schema import events, jobs, webhook_lanes, webhooks

_ONLY_REPORTED = '"action":"report"'
"""What the body of an exceeded limit holds that stands in the report alone; a name in it has escaped quotes."""

_AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
"""When a new lane is due: an attempt's clock, which tells the times of its events, may be wrong."""


@dataclass(frozen=True)
class Pending:
    """The next event that a webhook is to be told of a job, and how often and since when that has failed."""

    hook: Webhook
    job_id: str
    job: MessageJob
    event: JobEvent
    num_failures: int
    failing_since: datetime | None


def anyone_listens() -> ColumnElement[bool]:
    """Whether any webhook is told of the job in whose statement this stands."""
    return exists(select(webhooks.c.id).where(*_listening(jobs.c.owner)).correlate(jobs))


def is_told(event_type: str, body: str) -> bool:
    """Whether webhooks are told of such events at all."""
    return event_type != Topic.LIMIT_EXCEEDED or _ONLY_REPORTED not in body


def extend_lanes(connection: Connection, job_id: str, owner: str, numbered: Sequence[tuple[int, str]]) -> None:
    """Let every webhook that listens be told of the job's new events, which are given by number and type."""
    query = select(webhooks.c.id, webhooks.c.topics).where(*_listening(owner)).order_by(webhooks.c.id)
    lanes = []
    for hook in connection.execute(query).all():
        topics = json.loads(hook.topics)
        wanted = [seq for seq, kind in numbered if kind in topics or Topic.EVERYTHING in topics]
        if wanted:
            lane = {"hook_id": hook.id, "job_id": job_id, "next_seq": wanted[0], "last_seq": wanted[-1]}
            lanes.append(lane | {"num_failures": 0, "next_try_at": _AT_ONCE})
    if lanes:
        _extend(connection, lanes)


def _listening(owner: Any) -> tuple[ColumnElement[bool], ...]:
    return (webhooks.c.state == WebhookState.ACTIVE, or_(webhooks.c.of_all, webhooks.c.owner == owner))


def _extend(connection: Connection, lanes: Sequence[dict[str, Any]]) -> None:
    """Begin these lanes, or let those that there are end later."""
    insert = (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(webhook_lanes)
    longer = {"last_seq": insert.excluded.last_seq}
    connection.execute(insert.on_conflict_do_update(index_elements=["hook_id", "job_id"], set_=longer), lanes)


def hooks_due(connection: Connection, now: datetime) -> list[str]:
    """The webhooks that have something to be told by now."""
    waiting = select(webhook_lanes.c.job_id).where(webhook_lanes.c.hook_id == webhooks.c.id, _due(now))
    query = select(webhooks.c.id).where(webhooks.c.state == WebhookState.ACTIVE, exists(waiting))
    return list(connection.execute(query).scalars())


def next_pending(connection: Connection, hook: Webhook, now: datetime) -> Pending | None:
    """What the webhook is to be told next; None where nothing is due.

    A webhook for everyone's jobs is told of its owner's alone while its owner is no admin.
    """
    query = select(webhook_lanes).where(webhook_lanes.c.hook_id == hook.id, _due(now))
    query = query.join(jobs).add_columns(jobs.c.name, jobs.c.state, jobs.c.owner)
    if not (hook.all and _is_admin(connection, hook.owner)):
        query = query.where(jobs.c.owner == hook.owner)
    lane = connection.execute(query.order_by(webhook_lanes.c.next_try_at, webhook_lanes.c.job_id).limit(1)).first()
    if lane is None:
        return None
    return Pending(
        hook,
        lane.job_id,
        MessageJob(name=lane.name, state=lane.state, owner=lane.owner),
        _next_event(connection, lane.job_id, lane.next_seq, hook),
        lane.num_failures,
        lane.failing_since,
    )


def tell_succeeded(connection: Connection, told: Pending, now: datetime) -> None:
    """Go on behind the event that was told; without effect if another dispatcher has."""
    c = webhook_lanes.c
    lane = (c.hook_id == told.hook.id, c.job_id == told.job_id)
    further = {"next_seq": told.event.seq + 1, "num_failures": 0, "failing_since": None, "next_try_at": now}
    connection.execute(update(webhook_lanes).where(*lane, c.next_seq <= told.event.seq).values(further))
    connection.execute(delete(webhook_lanes).where(*lane, c.next_seq > c.last_seq))


def tell_failed(connection: Connection, told: Pending, retry_at: datetime, now: datetime) -> None:
    """Let the lane wait until ``retry_at``."""
    c = webhook_lanes.c
    lane = (c.hook_id == told.hook.id, c.job_id == told.job_id, c.next_seq <= told.event.seq)
    waiting = {"num_failures": told.num_failures + 1, "failing_since": told.failing_since or now}
    connection.execute(update(webhook_lanes).where(*lane).values(waiting | {"next_try_at": retry_at}))


def hurry_lanes(connection: Connection, hook_id: str) -> None:
    """Let whatever the webhook is still to be told be told now."""
    connection.execute(update(webhook_lanes).where(webhook_lanes.c.hook_id == hook_id).values(next_try_at=_AT_ONCE))


def drop_lanes(connection: Connection, hook_id: str) -> None:
    """Forget what the webhook was still to be told."""
    connection.execute(delete(webhook_lanes).where(webhook_lanes.c.hook_id == hook_id))


def drop_lanes_of_nobody(connection: Connection) -> None:
    """Forget lanes that were written just as their webhook was removed, or was found to be failing."""
    active = select(webhooks.c.id).where(webhooks.c.state == WebhookState.ACTIVE)
    connection.execute(delete(webhook_lanes).where(webhook_lanes.c.hook_id.not_in(active)))


def _due(now: datetime) -> ColumnElement[bool]:
    return webhook_lanes.c.next_try_at <= now


def _is_admin(connection: Connection, name: str) -> bool:
    try:
        return get_principal(connection, name).role.includes(Role.ADMIN)
    except NotFound:
        return False


def _next_event(connection: Connection, job_id: str, from_seq: int, hook: Webhook) -> JobEvent:
    """The first event from ``from_seq`` on that the webhook wants; there is one, or its lane would have ended."""
    told = or_(events.c.type != Topic.LIMIT_EXCEEDED, events.c.body.not_like(f"%{_ONLY_REPORTED}%"))
    query = select(events).where(events.c.job_id == job_id, events.c.seq >= from_seq, told)
    if Topic.EVERYTHING not in hook.events:
        query = query.where(events.c.type.in_(hook.events))
    row = connection.execute(query.order_by(events.c.seq).limit(1)).one()
    return JobEvent(
        seq=row.seq, time=row.time, type=row.type, attempt=row.attempt, rank=row.rank, body=json.loads(row.body)
    )
