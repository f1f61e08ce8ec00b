"""The audit trail: only ever added to, which the database itself holds; see `service.store.schema`."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, select

from service.jobs import AuditEntry, AuditPage, AuditRecord
from service.store.api_keys import redacted
from service.store.cursors import Cursors
from service.store.engine import Database
from service.store.schema import audit

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
        values = entry.model_dump() | {"time": self._clock()}
        for name, length in _MAX_LENGTH.items():
            values[name] = redacted(values[name])[:length]
        with self._database.write() as connection:
            connection.execute(insert(audit).values(values))

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


def _record_of_row(row: Row[Any]) -> AuditRecord:
    return AuditRecord(**row._mapping)
