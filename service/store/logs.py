"""Log lines, numbered per job from 1 without holes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from service.jobs import LogRecord
from service.store.schema import jobs, logs


@dataclass(frozen=True)
class NewLine:
    """A log line that has no number yet."""

    time: datetime
    attempt: int
    rank: int
    level: str
    text: str


def append_lines(connection: Connection, job_id: str, new: Sequence[NewLine]) -> None:
    """Number the lines and store them."""
    if not new:
        return
    counted = update(jobs).where(jobs.c.id == job_id).values(num_logs=jobs.c.num_logs + len(new))
    last = connection.execute(counted.returning(jobs.c.num_logs)).scalar_one()
    rows = [{"job_id": job_id, "seq": seq, **vars(line)} for seq, line in enumerate(new, start=last - len(new) + 1)]
    connection.execute(insert(logs), rows)


def lines_after(connection: Connection, job_id: str, after_seq: int, limit: int) -> list[LogRecord]:
    """The next lines in order."""
    query = select(logs).where(logs.c.job_id == job_id, logs.c.seq > after_seq).order_by(logs.c.seq)
    return [
        LogRecord(seq=row.seq, time=row.time, attempt=row.attempt, rank=row.rank, level=row.level, text=row.text)
        for row in connection.execute(query.limit(limit))
    ]
