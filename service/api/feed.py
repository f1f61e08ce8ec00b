"""The feed: every followed job is looked up once for all of its readers, however many there are."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import structlog
from anyio.to_thread import run_sync

from service.errors import NotFound, StoreUnavailable
from service.jobs import JobEvent
from service.store import Glance, JobStore

_LOOK_EVERY_S = 0.25
_EVENTS_A_LOOK = 200
_TAIL = 200
"""Events of a job kept in memory while someone follows it; a reader that is farther behind asks the store."""

_log = structlog.get_logger("api")


class Followed:
    """A job that at least one reader follows: its latest glance, and the events that came while it was followed."""

    def __init__(self, glance: Glance) -> None:
        self.glance = glance
        self.num_readers = 0
        self._tail: deque[JobEvent] = deque(maxlen=_TAIL)
        self._changed = asyncio.Event()

    @property
    def last_seq(self) -> int:
        """The newest event that is known here."""
        return self._tail[-1].seq if self._tail else self.glance.num_events

    def after(self, seen: int) -> list[JobEvent] | None:
        """The events after number ``seen``; None where they are not all here."""
        if seen >= self.glance.num_events:
            return []
        if not self._tail or seen + 1 < self._tail[0].seq:
            return None
        return [event for event in self._tail if event.seq > seen]

    def update(self, glance: Glance, events: list[JobEvent]) -> None:
        """Take in what a look has brought, and wake the readers if it is anything."""
        if glance == self.glance and not events:
            return
        self.glance = glance
        self._tail.extend(events)
        self.wake()

    def wake(self) -> None:
        """Let every reader look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, timeout_s: float | None) -> None:
        """Return at the next change, or after ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()


class Feed:
    """Looks at all followed jobs four times a second, as long as there is any. Lives in one event loop.

    Cost: one query a look for all jobs together, one more for each job that has new events; memory of at most 200
    events a job. ``stopping`` wakes all readers, which are expected to leave then.
    """

    def __init__(self, store: JobStore, stopping: threading.Event) -> None:
        self._store = store
        self._stopping = stopping
        self._followed: dict[str, Followed] = {}
        self._looking: asyncio.Task[None] | None = None

    @property
    def num_readers(self) -> int:
        """How many readers there are, of all jobs together."""
        return sum(followed.num_readers for followed in list(self._followed.values()))

    @asynccontextmanager
    async def follow(self, job_id: str) -> AsyncIterator[Followed]:
        """Keep the job under watch inside the block. Raises: NotFound, StoreUnavailable."""
        followed = self._followed.get(job_id)
        if followed is None:
            found = await run_sync(self._store.glances, (job_id,))
            if job_id not in found:
                raise NotFound(f"there is no job {job_id}")
            followed = self._followed.setdefault(job_id, Followed(found[job_id]))
        followed.num_readers += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._keep_looking())
        try:
            yield followed
        finally:
            followed.num_readers -= 1
            if not followed.num_readers:
                self._followed.pop(job_id, None)

    async def _keep_looking(self) -> None:
        try:
            while self._followed:
                last_seqs = {job_id: followed.last_seq for job_id, followed in self._followed.items()}
                try:
                    self._take_in(await run_sync(self._look, last_seqs))
                except StoreUnavailable as error:
                    _log.warning("the store does not answer those who follow jobs", error=str(error))
                if self._stopping.is_set():
                    for followed in self._followed.values():
                        followed.wake()
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            self._looking = None

    def _look(self, last_seqs: Mapping[str, int]) -> dict[str, tuple[Glance, list[JobEvent]]]:
        return {
            job_id: (glance, self._new_events(job_id, last_seqs[job_id], glance.num_events))
            for job_id, glance in self._store.glances(last_seqs.keys()).items()
        }

    def _new_events(self, job_id: str, seen: int, num_events: int) -> list[JobEvent]:
        """Those after ``seen``, or only the newest where they are more than are kept."""
        seen = max(seen, num_events - _TAIL)
        events: list[JobEvent] = []
        while seen < num_events and (more := self._store.events(job_id, seen, _EVENTS_A_LOOK)):
            events += more
            seen = more[-1].seq
        return events

    def _take_in(self, found: Mapping[str, tuple[Glance, list[JobEvent]]]) -> None:
        for job_id, (glance, events) in found.items():
            if job_id in self._followed:
                self._followed[job_id].update(glance, events)
