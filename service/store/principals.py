"""Principals: who may use the service, as what, and how much at once."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from service.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from service.jobs import ADMIN, ANONYMOUS, Principal, PrincipalTerms, Quota, Role
from service.store.engine import Database
from service.store.schema import principals

_BUILT_IN = (ADMIN, ANONYMOUS)
"""Always there, always admins: the operator, and whoever uses a service that asks for no keys."""


class Principals:
    """The principals of one database; each method is one transaction."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self.num_changes = 0
        """How often this process has changed any of them: what it remembers of before may hold no more."""

    def get(self, name: str) -> Principal:
        """The principal. Raises NotFound."""
        with self._database.read() as connection:
            return get_principal(connection, name)

    def page(self, limit: int = 50, after: str = "") -> list[Principal]:
        """Stored principals whose names come after ``after``, in order of their names."""
        query = select(principals).where(principals.c.name > after).order_by(principals.c.name).limit(limit)
        with self._database.read() as connection:
            return [_principal_of_row(row) for row in connection.execute(query)]

    def put(self, name: str, terms: PrincipalTerms) -> tuple[Principal, bool]:
        """Set a principal's terms; also whether it is new. They hold from its next request on.

        Raises: InvalidRequest where the terms would take its role from a built-in principal; Conflict where another
        writer made the principal in the same moment.
        """
        if name in _BUILT_IN and terms.role is not Role.ADMIN:
            text = f"{name} is always an admin; make another principal for a lesser role"
            raise InvalidRequest([FieldProblem("/role", "role_fixed", text)])
        with self._database.write() as connection:
            created = put_principal(connection, name, terms, self._clock())
            principal = get_principal(connection, name)
        self.num_changes += 1
        return principal, created

    def quota_of(self, name: str) -> Quota:
        """What the principal may hold; nothing limits one that is not stored."""
        with self._database.read() as connection:
            row = connection.execute(select(principals).where(principals.c.name == name)).one_or_none()
        return Quota() if row is None else _quota_of_row(row)


def get_principal(connection: Connection, name: str) -> Principal:
    """The principal. Raises NotFound."""
    row = connection.execute(select(principals).where(principals.c.name == name)).one_or_none()
    if row is not None:
        return _principal_of_row(row)
    if name in _BUILT_IN:
        return Principal(name=name, role=Role.ADMIN)
    raise NotFound(
        f"there is no principal {name}; an admin makes one with PUT /v1/principals/{name}, "
        "or `syncbn keys create --role` on the service's machine"
    )


def hold_quota(connection: Connection, name: str) -> Quota:
    """What the principal may hold, which nobody else can change, nor hold, until the transaction ends."""
    chosen = select(principals).where(principals.c.name == name)
    row = connection.execute(chosen.with_for_update(key_share=True)).one_or_none()
    return Quota() if row is None else _quota_of_row(row)


def put_principal(connection: Connection, name: str, terms: PrincipalTerms, now: datetime) -> bool:
    """Store the terms; whether the principal is new. Raises Conflict where another writer makes it meanwhile."""
    values = {"role": terms.role, "updated_at": now, **terms.quota.model_dump()}
    if connection.execute(update(principals).where(principals.c.name == name).values(values)).rowcount:
        return False
    try:
        connection.execute(insert(principals).values(name=name, created_at=now, **values))
    except IntegrityError as error:
        raise Conflict(f"{name} was made by someone else just now; look at it and try again") from error
    return True


def _principal_of_row(row: Row[Any]) -> Principal:
    return Principal(name=row.name, role=Role(row.role), quota=_quota_of_row(row))


def _quota_of_row(row: Row[Any]) -> Quota:
    return Quota(max_running_workers=row.max_running_workers, max_queued_jobs=row.max_queued_jobs)
