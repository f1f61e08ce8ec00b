"""One rank's telemetry on its way to the service: in order, numbered, in bounded memory, nothing dropped."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One fact as it travels: when it happened (seconds since the epoch), and its JSON."""

    time: float
    event: str


class Outbox:
    """What one rank has told and the service has not yet acknowledged.

    Keeps ``max_in_memory`` records in memory; what comes on top waits in a file at ``spool_path`` that exists only
    while it is needed. Sequence numbers count from 0 without holes. Not thread-safe.
    """

    def __init__(self, rank: int, spool_path: Path, max_in_memory: int = 4096) -> None:
        self.rank = rank
        self._spool = _Spool(spool_path)
        self._max_in_memory = max_in_memory
        self._memory: deque[Record] = deque()
        self._first_seq = 0

    def __len__(self) -> int:
        return len(self._memory) + len(self._spool)

    @property
    def first_seq(self) -> int:
        """The sequence number of the oldest record that is not acknowledged."""
        return self._first_seq

    def put(self, records: Sequence[Record]) -> None:
        """Add records. Raises OSError if they must go to disk and the disk does not take them: then none was added."""
        room = 0 if len(self._spool) else max(self._max_in_memory - len(self._memory), 0)
        self._spool.append(records[room:])
        self._memory.extend(records[:room])

    def head(self, max_records: int, max_bytes: int) -> list[Record]:
        """The oldest records, as many as both bounds allow but at least one if there is one."""
        self._refill()
        chosen: list[Record] = []
        size = 0
        for record in islice(self._memory, max_records):
            size += len(record.event)
            if chosen and size > max_bytes:
                break
            chosen.append(record)
        return chosen

    def acknowledge(self, next_seq: int) -> None:
        """Forget all before ``next_seq``. A number out of range is the service's error and changes nothing."""
        if not self._first_seq <= next_seq <= self._first_seq + len(self._memory):
            return
        for _ in range(next_seq - self._first_seq):
            self._memory.popleft()
        self._first_seq = next_seq

    def close(self) -> None:
        """Remove the file, with whatever it still holds."""
        self._spool.close()

    def _refill(self) -> None:
        if len(self._spool) and len(self._memory) <= self._max_in_memory // 2:
            self._memory.extend(self._spool.take(self._max_in_memory - len(self._memory)))


class _Spool:
    """A queue of records in a file; the file goes when the queue is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        self._read_offset = 0

    def __len__(self) -> int:
        return self._count

    def append(self, records: Sequence[Record]) -> None:
        if not records:
            return
        lines = "".join(f"{record.time!r} {record.event}\n" for record in records).encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab" if self._count else "wb", buffering=0) as file:
            end = file.tell()
            try:
                written = 0
                while written < len(lines):
                    written += file.write(lines[written:]) or 0
            except OSError:
                file.truncate(end)
                raise
        self._count += len(records)

    def take(self, max_records: int) -> list[Record]:
        taken = []
        with self._path.open("rb") as file:
            file.seek(self._read_offset)
            for line in islice(file, min(max_records, self._count)):
                time, _, event = line.decode().rstrip("\n").partition(" ")
                taken.append(Record(float(time), event))
                self._read_offset += len(line)
        self._count -= len(taken)
        if self._count == 0:
            self.close()
        return taken

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._count = self._read_offset = 0
