"""The audit trail: only ever added to, which the database itself holds; see `service.store.schema`.

Its oldest entries go when their time of keeping is over. From when on entries are kept is written first, together with
an entry that says so; the database lets only those go that lie before.
"""

import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from service.jobs import AuditEntry, AuditPage, AuditRecord
from service.store.api_keys import redacted
from service.store.cursors import Cursors
from service.store.engine import Database
from service.store.locks import insert_if_absent
from service.store.schema import audit, audit_floor

_PIECE = 2_000
"""Entries that go in one transaction: some 10 ms."""

_MAX_LENGTH = {"action": 500, "target": 500, "detail": 10_000}
"""Paths come from outside and may be of any length; what is beyond this is cut."""


class AuditTrail:
    """The trail of one database; each method is one transaction."""

    def __init__(self, database: Database, cursors: Cursors, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._cursors = cursors
        self._clock = clock

    def append(self, entry: AuditEntry) -> None:
        """Add the entry, less any API key that its texts may hold."""
        self._database.transact(lambda connection: append_entry(connection, entry, self._clock()))

    def page(self, limit: int = 50, cursor: str | None = None, principal: str | None = None) -> AuditPage:
        """Entries, newest first, of everyone or of one principal; ``cursor`` is a former page's ``next_cursor``.

        Raises: InvalidRequest where the cursor was not made here, or for another principal.
        """
        filters = {"list": "audit", "principal": principal}
        query = select(audit).order_by(audit.c.seq.desc()).limit(limit + 1)
        if principal is not None:
            query = query.where(audit.c.principal == principal)
        if cursor is not None:
            (seq,) = self._cursors.open(cursor, filters)
            query = query.where(audit.c.seq < seq)
        with self._database.read() as connection:
            found = [_record_of_row(row) for row in connection.execute(query)]
        if len(found) <= limit:
            return AuditPage(items=tuple(found))
        return AuditPage(items=tuple(found[:limit]), next_cursor=self._cursors.seal([found[limit - 1].seq], filters))

    def trim(self, days: float, interrupted: Callable[[], bool] = lambda: False) -> int:
        """Remove the entries that are older; how many. One new entry says so before any of them goes.

        Ends soon once it is ``interrupted``; the next call goes on.

        Cost: some 10 ms for each 2,000 entries, in as many transactions. Raises: ValueError for less than no days.
        """
        if not days >= 0:
            raise ValueError(f"days is {days}; it must be at least 0")
        now = self._clock()
        self._database.transact(lambda connection: _raise_floor(connection, now - timedelta(days=days), days, now))
        removed = 0
        while not interrupted() and (num_removed := self._database.transact(_remove_piece)) > 0:
            removed += num_removed
        return removed


def append_entry(connection: Connection, entry: AuditEntry, now: datetime) -> None:
    """Add the entry, less any API key that its texts may hold."""
    values = entry.model_dump() | {"time": now}
    for name, length in _MAX_LENGTH.items():
        values[name] = redacted(values[name])[:length]
    connection.execute(insert(audit).values(values))


def _raise_floor(connection: Connection, kept_from: datetime, days: float, now: datetime) -> None:
    """Let what lies before ``kept_from`` be removed, if there is anything; the floor never comes down again."""
    num_old = connection.execute(select(func.count()).where(audit.c.time < kept_from)).scalar_one()
    if num_old == 0:
        return
    if not insert_if_absent(connection, audit_floor, {"id": 1, "kept_from": kept_from}):
        higher = audit_floor.c.kept_from < kept_from
        connection.execute(update(audit_floor).where(higher).values(kept_from=kept_from))
    told = f"{num_old} entries of before {kept_from:%Y-%m-%dT%H:%M:%SZ}: entries are kept for {days:g} days"
    entry = AuditEntry(
        address="local",
        action="audit trim",
        target="/v1/audit",
        detail=told,
        status=200,
        request_id=secrets.token_hex(8),
    )
    append_entry(connection, entry, now)


def _remove_piece(connection: Connection) -> int:
    floor = select(audit_floor.c.kept_from).scalar_subquery()
    oldest = select(audit.c.seq).where(audit.c.time < floor).order_by(audit.c.time).limit(_PIECE)
    return connection.execute(delete(audit).where(audit.c.seq.in_(oldest))).rowcount


def _record_of_row(row: Row[Any]) -> AuditRecord:
    return AuditRecord(**row._mapping)
