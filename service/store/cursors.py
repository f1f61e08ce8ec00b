"""Cursors: a place in a list, sealed with the service's own key, good for the one list it was made in."""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError

from service.errors import FieldProblem, InvalidRequest
from service.store.engine import Database
from service.store.schema import cursor_keys

_SEAL_BYTES = 16


class Cursors:
    """Seals and opens cursors. Every service on one database has the same key, which lives there."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, place: Sequence[str | int], filters: Mapping[str, Any]) -> str:
        """A cursor to what follows ``place`` in the list that ``filters`` choose."""
        content = json.dumps([_digest(filters), *place]).encode()
        return base64.urlsafe_b64encode(self._seal(content) + content).decode().rstrip("=")

    def open(self, cursor: str, filters: Mapping[str, Any]) -> list[Any]:
        """The place again.

        Raises: InvalidRequest where the cursor was not sealed here, or belongs to other filters.
        """
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        content = raw[_SEAL_BYTES:]
        if not content or not hmac.compare_digest(raw[:_SEAL_BYTES], self._seal(content)):
            raise _refusal("cursor_invalid", "is not a cursor of this service; take next_cursor from a page")
        place: list[Any] = json.loads(content)
        digest = place.pop(0)
        if digest != _digest(filters):
            raise _refusal(
                "cursor_of_other_filters", "belongs to a list with other filters; keep them, or leave it out"
            )
        return place

    def _seal(self, content: bytes) -> bytes:
        return hmac.digest(self._key, content, "sha256")[:_SEAL_BYTES]


def cursors_of(database: Database) -> Cursors:
    """The cursors of a database, which gets a key of 256 random bits when it is first asked for one."""
    with database.read() as connection:
        key = _stored(connection)
    if key is None:
        try:
            with database.write() as connection:
                connection.execute(insert(cursor_keys).values(id=1, key=secrets.token_bytes(32)))
        except IntegrityError:
            pass  # another service on this database was first
        with database.read() as connection:
            key = _stored(connection)
    assert key is not None
    return Cursors(key)


def _stored(connection: Connection) -> bytes | None:
    return connection.execute(select(cursor_keys.c.key).where(cursor_keys.c.id == 1)).scalar()


def _digest(filters: Mapping[str, Any]) -> str:
    text = json.dumps(filters, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refusal(code: str, text: str) -> InvalidRequest:
    return InvalidRequest([FieldProblem("/cursor", code, text)])
