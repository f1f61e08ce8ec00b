"""How a job is followed: what has been stored, in order, then what comes, until the job is over."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, TypeVar

from anyio.to_thread import run_sync

from service.api.event_stream import WORD_OF_LIFE, message
from service.api.feed import Followed
from service.api.parts import Parts
from service.jobs import View
from service.store import Glance

_SILENCE_S = 15.0
"""A reader who hears nothing for much longer may take the connection for lost."""


class Numbered(Protocol):
    """A record with its number."""

    @property
    def seq(self) -> int:
        """Its place among the job's records of its kind, which are numbered from 1 without holes."""


_Record = TypeVar("_Record", bound=Numbered)


class Records(Protocol[_Record]):
    """One kind of what a job has told, as one reader wants to be told of it."""

    def last_seq(self, glance: Glance) -> int:
        """The number of the newest record."""

    async def after(self, followed: Followed, seen: int) -> Sequence[_Record]:
        """The next ones after number ``seen``, not more than may wait in memory for a slow reader."""

    def message(self, record: _Record) -> bytes:
        """The record as a message with its number; empty where this reader does not want to know."""

    def beside(self, glance: Glance) -> bytes:
        """What else is to be told now, without a number: a reader who misses it is told something newer."""
        return b""

    def beside_in_s(self, glance: Glance) -> float:
        """How soon there will be something else to tell, even if nothing happens to the job."""
        return _SILENCE_S


class StreamReset(View):
    """A reader's place is beyond the newest record, as after a restored backup: it is told everything again."""

    asked_seq: int
    """After which number the reader wanted to go on."""
    last_seq: int
    """The newest number that there is."""
    next_seq: int
    """The number with which the stream goes on. What the reader has kept from this number on holds no more."""


async def follow(parts: Parts, job_id: str, seen: int, records: Records[_Record]) -> AsyncGenerator[bytes]:
    """What one reader is told who has had everything up to number ``seen``; ``end`` with the job is the last.

    Ends without it when the service stops. For a reader who takes nothing no more is read than its last look brought,
    and `service.api.patience` bounds how long that waits. Raises: NotFound, StoreUnavailable.
    """
    async with parts.feed.follow(job_id) as followed:
        last_seq = await _last_seq(parts, job_id, seen, records, followed)
        if seen > last_seq:
            yield message("reset", StreamReset(asked_seq=seen, last_seq=last_seq, next_seq=1), 0)
            seen = 0
        speaks_by = time.monotonic() + _SILENCE_S
        while not parts.stopping.is_set():
            glance = followed.glance
            found = await records.after(followed, seen)
            words = b"".join([*map(records.message, found), records.beside(glance)])
            if words or time.monotonic() >= speaks_by:
                yield words or WORD_OF_LIFE
                speaks_by = time.monotonic() + _SILENCE_S
            if found:
                seen = found[-1].seq
            elif glance is followed.glance:
                if glance.state.terminal:
                    yield message("end", await run_sync(parts.store.get, job_id))
                    return
                await followed.wait(max(min(speaks_by - time.monotonic(), records.beside_in_s(glance)), 0))


async def _last_seq(parts: Parts, job_id: str, seen: int, records: Records[_Record], followed: Followed) -> int:
    """The newest number; the store is asked where the feed's last look does not explain what the reader has seen."""
    last_seq = records.last_seq(followed.glance)
    if seen <= last_seq:
        return last_seq
    return records.last_seq((await run_sync(parts.store.glances, (job_id,)))[job_id])
