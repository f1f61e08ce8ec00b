"""API keys: made, shown once, and from then on known by their SHA-256 alone.

A key is 256 random bits. One round of SHA-256 is therefore enough: there is no dictionary to try, and nothing is
gained by making each try slow.
"""

import hashlib
import re
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from service.errors import Conflict, FieldProblem, InvalidRequest, NotFound, StoreUnavailable, Unauthorized
from service.jobs import ANONYMOUS, ApiKey, Caller, NewApiKey, new_key_id
from service.store.engine import Database
from service.store.principals import get_principal
from service.store.schema import api_keys

USE_TOLD_EVERY = timedelta(minutes=5)
"""How coarse ``last_used_at`` is: a busy key shall not cost one write for each request."""

_KEY = re.compile(r"syncbn_[0-9a-f]{64}")
"""What a key looks like, so that scanners of repositories and logs can find one that has leaked."""


class ApiKeys:
    """The keys of one database; each method is one transaction."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self.num_changes = 0
        """How often this process has changed any of them: what it remembers of before may hold no more."""

    def make(self, principal: str, life: timedelta | None = None) -> NewApiKey:
        """A key for the principal, good for ``life`` or until it is revoked.

        Raises: InvalidRequest where there is no such principal, or it is the anonymous one.
        """
        with self._database.write() as connection:
            made = make_key(connection, principal, life, self._clock())
        self.num_changes += 1
        return made

    def page(self, limit: int = 50, after: str = "", principal: str | None = None) -> list[ApiKey]:
        """Keys with ids after ``after``, oldest first, of everyone or of one principal; whatever their state."""
        query = select(api_keys).where(api_keys.c.id > after).order_by(api_keys.c.id).limit(limit)
        if principal is not None:
            query = query.where(api_keys.c.principal == principal)
        with self._database.read() as connection:
            return [_key_of_row(row) for row in connection.execute(query)]

    def get(self, key_id: str) -> ApiKey:
        """What is known of the key. Raises NotFound."""
        with self._database.read() as connection:
            return _get_key(connection, key_id)

    def revoke(self, key_id: str) -> ApiKey:
        """Let the key open nothing any more; of a revoked key nothing changes. Raises NotFound."""
        with self._database.write() as connection:
            good = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            connection.execute(update(api_keys).where(*good).values(revoked_at=self._clock()))
            revoked = _get_key(connection, key_id)
        self.num_changes += 1
        return revoked

    def rotate(self, key_id: str, grace: timedelta = timedelta(0)) -> NewApiKey:
        """A new key for the same principal, good as long as this one was from its making on.

        The old key ends after ``grace``; without any, now. Raises: NotFound; Conflict where it has ended already.
        """
        now = self._clock()
        with self._database.write() as connection:
            old = _get_key(connection, key_id)
            if (ended := _why_ended(old, now)) is not None:
                raise Conflict(f"{key_id} {ended}; make a new key instead")
            _end(connection, old, now + grace if grace else None, now)
            life = None if old.expires_at is None else old.expires_at - old.created_at
            made = make_key(connection, old.principal, life, now)
        self.num_changes += 1
        return made

    def identify(self, key: str) -> Caller:
        """Who shows the key; their role is looked up now. Raises Unauthorized, and says to its holder why."""
        now = self._clock()
        refusal = "this is no key of this service"
        if _KEY.fullmatch(key) is None:
            raise Unauthorized(refusal)
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.sha256 == _sha256(key))).one_or_none()
            if row is None:
                raise Unauthorized(refusal)
            found = _key_of_row(row)
            if (ended := _why_ended(found, now)) is not None:
                raise Unauthorized(f"this key ({found.id}) {ended}; ask an admin for another")
            caller = Caller(principal=get_principal(connection, found.principal), key=found)
        self._tell_use(found, now)
        return caller

    def any_made(self) -> bool:
        """Whether there is any key, ended ones too: a service that has once asked for keys never opens again."""
        with self._database.read() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None

    def _tell_use(self, key: ApiKey, now: datetime) -> None:
        if key.last_used_at is not None and now - key.last_used_at < USE_TOLD_EVERY:
            return
        try:
            with self._database.write() as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(last_used_at=now))
        except StoreUnavailable:
            pass  # a request that only reads shall not fail for want of a write; the next one tells it


def make_key(connection: Connection, principal: str, life: timedelta | None, now: datetime) -> NewApiKey:
    """Store the SHA-256 of a fresh key, and tell the key."""
    if principal == ANONYMOUS:
        text = f"{ANONYMOUS} is whoever shows no key; make a key for another principal"
        raise InvalidRequest([FieldProblem("/principal", "principal_has_no_keys", text)])
    try:
        get_principal(connection, principal)
    except NotFound as error:
        raise InvalidRequest([FieldProblem("/principal", "principal_unknown", str(error))]) from error
    key = f"syncbn_{secrets.token_hex(32)}"
    made = NewApiKey(
        id=new_key_id(),
        principal=principal,
        created_at=now,
        expires_at=None if life is None else now + life,
        key=key,
    )
    row = made.model_dump(include={"id", "principal", "created_at", "expires_at"}) | {"sha256": _sha256(key)}
    connection.execute(insert(api_keys).values(row))
    return made


def redacted(text: str) -> str:
    """``text`` without any key that it may hold."""
    return _KEY.sub("syncbn_[redacted]", text)


def _end(connection: Connection, old: ApiKey, expires_at: datetime | None, now: datetime) -> None:
    """Let the key end now, or at ``expires_at`` if that is sooner than it would have; one writer alone can do it."""
    if expires_at is None:
        values: dict[str, datetime | None] = {"revoked_at": now}
    else:
        values = {"expires_at": expires_at if old.expires_at is None else min(expires_at, old.expires_at)}
    as_seen = (api_keys.c.id == old.id, api_keys.c.revoked_at.is_(None), _same_expiry(old))
    if connection.execute(update(api_keys).where(*as_seen).values(values)).rowcount != 1:
        raise Conflict(f"{old.id} was changed by someone else just now; look at it and try again")


def _same_expiry(old: ApiKey) -> Any:
    column = api_keys.c.expires_at
    return column.is_(None) if old.expires_at is None else column == old.expires_at


def _get_key(connection: Connection, key_id: str) -> ApiKey:
    row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {key_id}")
    return _key_of_row(row)


def _why_ended(key: ApiKey, now: datetime) -> str | None:
    if key.revoked_at is not None:
        return f"was revoked at {key.revoked_at:%Y-%m-%dT%H:%M:%SZ}"
    if key.expires_at is not None and key.expires_at <= now:
        return f"expired at {key.expires_at:%Y-%m-%dT%H:%M:%SZ}"
    return None


def _key_of_row(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        principal=row.principal,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
