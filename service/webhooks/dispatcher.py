"""Delivers what webhooks are to be told: at least once, of each job in order, and no webhook waits for another.

Of several services on one database one delivers at a time, under a lease. What was told is written after it was told;
whoever ends in between leaves it to the next to tell it once more, under the same name.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from service.errors import ServiceError
from service.jobs import AuditEntry, WebhookDelivery
from service.scheduler.leadership import Leadership
from service.store import JobStore, Lease, LeaseLost, Pending
from service.webhooks.backoff import Backoff
from service.webhooks.messages import message_of
from service.webhooks.sender import Sender

LEASE = "webhooks"

_SWEEP_EVERY_S = 60.0

_log = structlog.get_logger("webhooks")


@dataclass
class _Standing:
    """How a receiver has done lately, as far as this process knows."""

    num_failures: int = 0
    """In a row, of whatever it was told."""
    rests_until: float = float("-inf")
    """On the monotonic clock."""


class Dispatcher:
    """One for each service; ``holder`` names it as `Leadership` says, ``clock`` must be the store's."""

    def __init__(
        self,
        store: JobStore,
        sender: Sender,
        *,
        holder: str | None = None,
        backoff: Backoff | None = None,
        poll_s: float = 0.5,
        lease_ttl_s: float = 10.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._hooks = store.webhooks
        self._sender = sender
        self._leadership = Leadership(store, holder, lease_ttl_s, name=LEASE)
        self._backoff = backoff or Backoff()
        self._poll_s = poll_s
        self._clock = clock
        self._jitter = jitter
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._standings: dict[str, _Standing] = {}
        self._swept_at = float("-inf")

    def run(self, stopping: threading.Event) -> None:
        """Deliver until ``stopping`` is set; then what is on its way is given up and told again by the next."""
        asyncio.run(self._run(stopping))

    async def _run(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                try:
                    await self._tick()
                except LeaseLost:
                    self._lose()
                except ServiceError as error:
                    _log.warning("webhooks wait", error=str(error))
                await asyncio.sleep(self._poll_s)
        finally:
            await self._lay_down()
        try:
            await asyncio.to_thread(self._leadership.release)
        except ServiceError as error:
            _log.warning("the lease was not given back; it expires by itself", error=str(error))

    async def _tick(self) -> None:
        """Set someone to work for each webhook that has something to be told and nobody at work."""
        for hook_id, task in [item for item in self._at_work.items() if item[1].done()]:
            del self._at_work[hook_id]
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failed_again(hook_id)
                _log.error("webhook worker failed", hook=hook_id, exc_info=error)
        if not await asyncio.to_thread(self._leadership.hold):
            await self._lay_down()
            return
        await self._sweep()
        now = time.monotonic()
        for hook_id in await asyncio.to_thread(self._hooks.due):
            if hook_id not in self._at_work and self._standing(hook_id).rests_until <= now:
                self._at_work[hook_id] = asyncio.create_task(self._serve(hook_id))

    async def _serve(self, hook_id: str) -> None:
        """Tell one webhook all that is due, one message after the other, until one fails."""
        try:
            while (told := await asyncio.to_thread(self._hooks.pending, hook_id)) is not None:
                delivery = await self._sender.send(told.hook, *message_of(told))
                if delivery.error is not None:
                    self._failed_again(hook_id)
                    await asyncio.to_thread(self._put_off, told, delivery, self._lease())
                    return
                await asyncio.to_thread(self._hooks.succeeded, told, delivery, self._lease())
                self._standings.pop(hook_id, None)
        except LeaseLost:
            self._lose()
        except ServiceError as error:
            _log.warning("webhook waits", hook=hook_id, error=str(error))

    def _put_off(self, told: Pending, delivery: WebhookDelivery, lease: Lease) -> None:
        """Let the event wait; after a day of failures let all wait, and put that on record."""
        now = self._clock()
        retry_at = self._backoff.next_try(told.num_failures, told.failing_since, now, self._jitter())
        self._hooks.failed(told, delivery, retry_at, lease)
        if retry_at is not None:
            return
        since = told.failing_since or now
        text = f"{told.job_id}.{told.event.seq} could not be delivered since {since:%Y-%m-%dT%H:%M:%SZ}"
        detail = f"{text}: {delivery.error}; nothing is sent until a test succeeds"
        _log.warning("webhook is failing", hook=told.hook.id, detail=detail)
        target = f"/v1/webhooks/{told.hook.id}"
        self._store.audit.append(
            AuditEntry(
                address="local", action="webhook given up", target=target, detail=detail, status=200, request_id=""
            )
        )

    def _lease(self) -> Lease:
        """The lease to write under, which another worker may just have found to be lost. Raises: LeaseLost."""
        lease = self._leadership.lease
        if lease is None:
            raise LeaseLost("another service delivers by now")
        return lease

    def _lose(self) -> None:
        if self._leadership.lease is not None:  # or another worker has said so already
            self._leadership.lose()

    def _failed_again(self, hook_id: str) -> None:
        standing = self._standing(hook_id)
        standing.num_failures += 1
        standing.rests_until = time.monotonic() + self._backoff.pause_s(standing.num_failures)

    def _standing(self, hook_id: str) -> _Standing:
        return self._standings.setdefault(hook_id, _Standing())

    async def _sweep(self) -> None:
        if time.monotonic() - self._swept_at >= _SWEEP_EVERY_S:
            await asyncio.to_thread(self._hooks.sweep, self._lease())
            self._swept_at = time.monotonic()

    async def _lay_down(self) -> None:
        """Stop whatever is on its way."""
        for task in self._at_work.values():
            task.cancel()
        await asyncio.gather(*self._at_work.values(), return_exceptions=True)
        self._at_work.clear()
