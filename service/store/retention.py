"""Forgetting what ended jobs have told, when its time of keeping is over, and saying so ever after.

That it is forgotten is written first, in a transaction of its own; from then on readers are told `Gone`. What was told
goes afterwards, a bounded piece in each transaction, so that no writer waits long; after a crash the next call goes
on where this one stopped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, exists, func, select, tuple_, update

from service.errors import Gone
from service.jobs import JobState
from service.store.engine import Database
from service.store.events import STATE_CHANGED
from service.store.locks import insert_if_absent
from service.store.schema import events, forgotten, jobs, layer_samples, logs, metric_chunks, steps

_PIECE = 2_000
"""Rows that go in one transaction: some 10 ms."""
_PIECE_OF_CHUNKS = 100
_PIECE_OF_JOBS = 500

_LASTING = (STATE_CHANGED, "checkpoint")
"""Events that keep their bodies: how the job came to its end, and what another may go on from."""


class Told(StrEnum):
    """What is kept of a job, and may be forgotten, each for itself."""

    METRICS = "metrics"
    """What was measured at steps, samples of layers among it."""
    LOGS = "logs"
    EVENTS = "events"
    """The bodies of events, which hold evaluations and drift; that they happened, when and where, stays."""


@dataclass(frozen=True)
class Retention:
    """For how many days after a job's end what it told is kept; None: for ever."""

    metrics_days: float | None = None
    logs_days: float | None = None
    events_days: float | None = None

    def __post_init__(self) -> None:
        for what, days in self.days.items():
            if days is not None and not days >= 0:
                raise ValueError(f"{what.value}_days is {days}; it must be at least 0, or None to keep for ever")

    @property
    def days(self) -> dict[Told, float | None]:
        """The days of each."""
        return {Told.METRICS: self.metrics_days, Told.LOGS: self.logs_days, Told.EVENTS: self.events_days}


def forget(
    database: Database, policy: Retention, now: datetime, interrupted: Callable[[], bool] = lambda: False
) -> dict[Told, int]:
    """Of how many jobs each has now been forgotten; see this module. Ends soon once it is ``interrupted``.

    Cost: some 10 ms for each 2,000 rows or 100 chunks, in as many transactions. The file of an SQLite database does
    not become smaller; what is freed in it is used again.
    """
    for what, days in policy.days.items():
        if days is not None:
            declare = _declare(what, _ended_before(now, days), now)
            while not interrupted() and database.transact(declare) == _PIECE_OF_JOBS:
                pass
    with database.read() as connection:
        open_cases = connection.execute(select(forgotten.c.job_id, forgotten.c.what).where(~forgotten.c.complete)).all()
    done = dict.fromkeys(Told, 0)
    for job_id, name in open_cases:
        what = Told(name)
        if not _drop(database, job_id, what, now, interrupted):
            break
        done[what] += 1
    return done


def require_told(connection: Connection, job_id: str, what: Told) -> None:
    """Raise Gone where this has been forgotten."""
    chosen = (forgotten.c.job_id == job_id, forgotten.c.what == what)
    at = connection.execute(select(forgotten.c.at).where(*chosen)).scalar()
    if at is not None:
        raise Gone(f"the {what} of {job_id} were forgotten at {at:%Y-%m-%dT%H:%M:%SZ}: its time of keeping was over")


def _ended_before(now: datetime, days: float) -> ColumnElement[bool]:
    states = [state for state in JobState if state.terminal]
    return and_(jobs.c.state.in_(states), jobs.c.finished_at <= now - timedelta(days=days))


def _declare(what: Told, ended: ColumnElement[bool], now: datetime) -> Callable[[Connection], int]:
    """Write of a piece of the jobs that it is forgotten; how many they were."""

    def declare(connection: Connection) -> int:
        known = exists().where(forgotten.c.job_id == jobs.c.id, forgotten.c.what == what)
        query = select(jobs.c.id).where(ended, ~known).order_by(jobs.c.id).limit(_PIECE_OF_JOBS)
        found = connection.execute(query).scalars().all()
        for job_id in found:
            # Another service may be forgetting the same just now.
            insert_if_absent(connection, forgotten, {"job_id": job_id, "what": what, "at": now, "complete": False})
        return len(found)

    return declare


def _drop(database: Database, job_id: str, what: Told, now: datetime, interrupted: Callable[[], bool]) -> bool:
    """Whether all of it is gone, because nobody interrupted."""
    drop = {Told.METRICS: _drop_metrics, Told.LOGS: _drop_logs, Told.EVENTS: _drop_bodies}[what]
    at: int | None = 0
    while at is not None:
        if interrupted():
            return False
        at = database.transact(partial(drop, job_id=job_id, at=at, now=now))
    this = (forgotten.c.job_id == job_id, forgotten.c.what == what)
    with database.write() as connection:
        connection.execute(update(forgotten).where(*this).values(complete=True))
    return True


def _drop_metrics(connection: Connection, job_id: str, at: int, now: datetime) -> int | None:
    """Delete a piece; where to go on, or None when nothing is left."""
    c = metric_chunks.c
    query = select(c.rank, c.first_step).where(c.job_id == job_id).limit(_PIECE_OF_CHUNKS)
    found = [tuple(row) for row in connection.execute(query)]
    if found:
        chosen = tuple_(c.rank, c.first_step).in_(found)
        connection.execute(delete(metric_chunks).where(c.job_id == job_id, chosen))
        return 0
    s = layer_samples.c
    query = select(s.attempt, s.step).where(s.job_id == job_id).limit(_PIECE_OF_CHUNKS)
    sampled = [tuple(row) for row in connection.execute(query)]
    if sampled:
        connection.execute(delete(layer_samples).where(s.job_id == job_id, tuple_(s.attempt, s.step).in_(sampled)))
        return 0
    return _drop_first_rows(connection, steps, job_id, "step")


def _drop_logs(connection: Connection, job_id: str, at: int, now: datetime) -> int | None:
    return _drop_first_rows(connection, logs, job_id, "seq")


def _drop_first_rows(connection: Connection, table: Table, job_id: str, number: str) -> int | None:
    of_job, column = table.c.job_id == job_id, table.c[number]
    last = select(column).where(of_job).order_by(column).limit(1).offset(_PIECE - 1)
    border = connection.execute(last).scalar()
    connection.execute(delete(table).where(of_job if border is None else and_(of_job, column <= border)))
    return None if border is None else 0


def _drop_bodies(connection: Connection, job_id: str, at: int, now: datetime) -> int | None:
    """Replace the bodies of the events after number ``at``."""
    body = json.dumps({"forgotten_at": now.isoformat()})
    piece = and_(events.c.job_id == job_id, events.c.seq > at, events.c.seq <= at + _PIECE)
    connection.execute(update(events).where(piece, events.c.type.not_in(_LASTING)).values(body=body))
    last = connection.execute(select(func.max(events.c.seq)).where(events.c.job_id == job_id)).scalar()
    return None if last is None or last <= at + _PIECE else at + _PIECE
