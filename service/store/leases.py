"""Leases: of several services that share one database, one at a time may do what a lease is named for.

A token numbers the holders. A write that carries its holder's lease happens only while nobody has come after, judged
inside the write's own transaction; so a service that was away too long can change nothing, whatever it believes. The
services' clocks decide only how soon a lease that was left behind is taken over, never who may write.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, select, update

from service.errors import Conflict
from service.store.locks import insert_if_absent
from service.store.schema import leases


@dataclass(frozen=True)
class Lease:
    """The right to do what ``name`` says, from the holder's side; ``token`` grows by one with each change of holder."""

    name: str
    holder: str
    token: int
    expires_at: datetime


class LeaseLost(Conflict):
    """Another holder has the lease by now, or it was given back: nothing was written."""

    code = "lease_lost"
    title = "The lease is another's"


def acquire_lease(connection: Connection, name: str, holder: str, ttl_s: float, now: datetime) -> Lease | None:
    """The lease for ``ttl_s`` from now on; None while another holder's has not expired.

    Safe beside others: the row is locked from reading it to the end of the transaction.
    """
    insert_if_absent(connection, leases, {"name": name, "holder": None, "token": 0, "expires_at": now})
    row = connection.execute(select(leases).where(leases.c.name == name).with_for_update()).one()
    if row.holder not in (None, holder) and row.expires_at > now:
        return None
    token = row.token if row.holder == holder else row.token + 1
    lease = Lease(name, holder, token, now + timedelta(seconds=ttl_s))
    taken = {"holder": holder, "token": token, "expires_at": lease.expires_at}
    connection.execute(update(leases).where(leases.c.name == name).values(taken))
    return lease


def renew_lease(connection: Connection, lease: Lease, ttl_s: float, now: datetime) -> bool:
    """Whether the lease is still the holder's, now for ``ttl_s`` more; one that expired and nobody took still is."""
    renewed = update(leases).where(*_same(lease)).values(expires_at=now + timedelta(seconds=ttl_s))
    return connection.execute(renewed).rowcount == 1


def release_lease(connection: Connection, lease: Lease, now: datetime) -> None:
    """Let anyone take the lease; without effect if it is another's already."""
    connection.execute(update(leases).where(*_same(lease)).values(holder=None, expires_at=now))


def require_lease(connection: Connection, lease: Lease | None) -> None:
    """Hold the lease's row until the transaction ends, so that nobody can take it before. Raises: LeaseLost."""
    if lease is None:
        return
    if connection.execute(select(leases.c.token).where(*_same(lease)).with_for_update(read=True)).first() is None:
        raise LeaseLost(f"{lease.holder} no longer holds the lease {lease.name} (token {lease.token})")


def _same(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (leases.c.name == lease.name, leases.c.holder == lease.holder, leases.c.token == lease.token)
