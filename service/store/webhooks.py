"""Webhooks, and what came of the last tries to tell them something."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from service.errors import NotFound, TooManyRequests
from service.jobs import Webhook, WebhookDelivery, WebhookOrder, WebhookState, new_hook_id
from service.store.engine import Database
from service.store.lanes import (
    Pending,
    drop_lanes,
    drop_lanes_of_nobody,
    hooks_due,
    hurry_lanes,
    next_pending,
    tell_failed,
    tell_succeeded,
)
from service.store.leases import Lease, require_lease
from service.store.locks import lock_name
from service.store.schema import webhook_deliveries, webhooks

MAX_OF_OWNER = 20
"""Webhooks of one principal."""

DELIVERIES_KEPT = 100
"""Of each webhook, the last tries."""


class Webhooks:
    """The webhooks of one database; each method is one transaction."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def make(self, order: WebhookOrder, owner: str) -> Webhook:
        """A webhook that is told of all that happens from now on. Raises TooManyRequests beyond `MAX_OF_OWNER`."""
        hook_id = new_hook_id()
        row = {
            "id": hook_id,
            "owner": owner,
            "url": str(order.url),
            "topics": json.dumps(order.topics),
            "secret_name": order.secret,
            "of_all": order.all,
            "state": WebhookState.ACTIVE,
            "num_deliveries": 0,
            "created_at": self._clock(),
        }

        def make(connection: Connection) -> Webhook:
            lock_name(connection, "webhooks", owner)
            count = select(func.count()).select_from(webhooks).where(webhooks.c.owner == owner)
            if connection.execute(count).scalar_one() >= MAX_OF_OWNER:
                raise TooManyRequests(f"{owner} has {MAX_OF_OWNER} webhooks, which is the most; remove one first")
            connection.execute(insert(webhooks).values(row))
            return _get_hook(connection, hook_id)

        return self._database.transact(make)

    def get(self, hook_id: str) -> Webhook:
        """The webhook. Raises NotFound."""
        with self._database.read() as connection:
            return _get_hook(connection, hook_id)

    def page(self, limit: int = 50, after: str = "", owner: str | None = None) -> list[Webhook]:
        """Webhooks with ids after ``after``, oldest first, of everyone or of one principal."""
        query = select(webhooks).where(webhooks.c.id > after).order_by(webhooks.c.id).limit(limit)
        if owner is not None:
            query = query.where(webhooks.c.owner == owner)
        with self._database.read() as connection:
            return [_hook_of_row(row) for row in connection.execute(query)]

    def remove(self, hook_id: str) -> None:
        """Forget the webhook and all that it was still to be told. Raises NotFound."""

        def remove(connection: Connection) -> None:
            _lock_hook(connection, hook_id)
            drop_lanes(connection, hook_id)
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.hook_id == hook_id))
            connection.execute(delete(webhooks).where(webhooks.c.id == hook_id))

        self._database.transact(remove)

    def deliveries(self, hook_id: str, limit: int = DELIVERIES_KEPT) -> list[WebhookDelivery]:
        """The last tries, newest first. Raises NotFound."""
        table = webhook_deliveries
        query = select(table).where(table.c.hook_id == hook_id).order_by(table.c.number.desc()).limit(limit)
        with self._database.read() as connection:
            _get_hook(connection, hook_id)
            return [WebhookDelivery(**row._mapping) for row in connection.execute(query)]

    def record_test(self, hook_id: str, delivery: WebhookDelivery) -> Webhook:
        """Remember a test. One that succeeded lets what waits be told at once.

        A failing webhook is told again then, of what happens from now on. Raises NotFound.
        """

        def record(connection: Connection) -> Webhook:
            hook = _lock_hook(connection, hook_id)
            _record(connection, hook_id, delivery)
            if delivery.error is None and hook.state is WebhookState.FAILING:
                drop_lanes(connection, hook_id)
                _set_state(connection, hook_id, WebhookState.ACTIVE)
            elif delivery.error is None:
                hurry_lanes(connection, hook_id)
            return _get_hook(connection, hook_id)

        return self._database.transact(record)

    # For whoever delivers

    def due(self) -> list[str]:
        """The webhooks that have something to be told by now. Costs one look at each webhook."""
        with self._database.read() as connection:
            return hooks_due(connection, self._clock())

    def pending(self, hook_id: str) -> Pending | None:
        """What the webhook is to be told next; None where nothing is due, or it is not there or failing."""
        with self._database.read() as connection:
            row = connection.execute(select(webhooks).where(webhooks.c.id == hook_id)).one_or_none()
            if row is None or row.state != WebhookState.ACTIVE:
                return None
            return next_pending(connection, _hook_of_row(row), self._clock())

    def succeeded(self, told: Pending, delivery: WebhookDelivery, lease: Lease | None = None) -> None:
        """Remember that the webhook was told. Of a webhook that is gone nothing is written. Raises LeaseLost."""

        def record(connection: Connection) -> None:
            require_lease(connection, lease)
            if _still_there(connection, told.hook.id):
                _record(connection, told.hook.id, delivery)
                tell_succeeded(connection, told, self._clock())

        self._database.transact(record)

    def failed(
        self, told: Pending, delivery: WebhookDelivery, retry_at: datetime | None, lease: Lease | None = None
    ) -> None:
        """Remember that telling failed, and to try again at ``retry_at``; without one the webhook is failing.

        Then what it was still to be told is forgotten. Raises LeaseLost.
        """

        def record(connection: Connection) -> None:
            require_lease(connection, lease)
            if not _still_there(connection, told.hook.id):
                return
            _record(connection, told.hook.id, delivery)
            if retry_at is None:
                _set_state(connection, told.hook.id, WebhookState.FAILING)
                drop_lanes(connection, told.hook.id)
            else:
                tell_failed(connection, told, retry_at, self._clock())

        self._database.transact(record)

    def sweep(self, lease: Lease | None = None) -> None:
        """Forget what is still to be told to webhooks that are gone or failing. Raises LeaseLost."""

        def sweep(connection: Connection) -> None:
            require_lease(connection, lease)
            drop_lanes_of_nobody(connection)

        self._database.transact(sweep)


def _record(connection: Connection, hook_id: str, delivery: WebhookDelivery) -> None:
    """Add the try to the last ones, whose numbers the webhook's locked row counts."""
    counted = update(webhooks).where(webhooks.c.id == hook_id).values(num_deliveries=webhooks.c.num_deliveries + 1)
    number = connection.execute(counted.returning(webhooks.c.num_deliveries)).scalar_one()
    row = delivery.model_dump() | {"hook_id": hook_id, "number": number}
    connection.execute(insert(webhook_deliveries).values(row))
    old = (webhook_deliveries.c.hook_id == hook_id, webhook_deliveries.c.number <= number - DELIVERIES_KEPT)
    connection.execute(delete(webhook_deliveries).where(*old))


def _set_state(connection: Connection, hook_id: str, state: WebhookState) -> None:
    connection.execute(update(webhooks).where(webhooks.c.id == hook_id).values(state=state))


def _still_there(connection: Connection, hook_id: str) -> bool:
    """Whether the webhook exists and is told anything, locked until the transaction ends."""
    query = select(webhooks.c.state).where(webhooks.c.id == hook_id).with_for_update()
    return connection.execute(query).scalar() == WebhookState.ACTIVE


def _lock_hook(connection: Connection, hook_id: str) -> Webhook:
    """The webhook, which stays as it is until the transaction ends; its row is always locked before its lanes."""
    row = connection.execute(select(webhooks).where(webhooks.c.id == hook_id).with_for_update()).one_or_none()
    if row is None:
        raise _unknown(hook_id)
    return _hook_of_row(row)


def _get_hook(connection: Connection, hook_id: str) -> Webhook:
    row = connection.execute(select(webhooks).where(webhooks.c.id == hook_id)).one_or_none()
    if row is None:
        raise _unknown(hook_id)
    return _hook_of_row(row)


def _unknown(hook_id: str) -> NotFound:
    return NotFound(f"there is no webhook {hook_id}")


def _hook_of_row(row: Row[Any]) -> Webhook:
    return Webhook(
        id=row.id,
        owner=row.owner,
        url=row.url,
        events=json.loads(row.topics),
        secret=row.secret_name,
        all=row.of_all,
        state=row.state,
        created_at=row.created_at,
    )
