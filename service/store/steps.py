"""Per-step metrics of every rank as they come in: the newest as rows, what is older as chunks.

A step that a later attempt repeats replaces what was there. Rows are cheap to add and to replace one by one, chunks
are small and quick to read by the thousand; so rows are what late, repeated and resumed steps mostly meet.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Double, and_, bindparam, delete, insert, select, type_coerce

from service.jobs import StepMetrics
from service.store.chunks import CHUNK_ROWS, LAST_STEP, Extent, extents, take_chunks, write_chunks
from service.store.schema import steps as rows
from service.store.step_arrays import STEP, Steps, keys, latest, step_array

MAX_ROWS_OF_RANK = CHUNK_ROWS * 5 // 4
"""How many steps of a rank stay rows before all but the newest fifth become a chunk."""

MAX_ROWS = 2**18
"""How many steps of all ranks do; above a hundred ranks each then moves fewer at a time."""

# Each ingest asks, and to build such a query anew takes longer than to answer it.
_OF_JOB = rows.c.job_id == bindparam("job")
_SPAN = and_(_OF_JOB, rows.c.step.between(bindparam("first"), bindparam("last")))
_KEYS = select(rows.c.rank, rows.c.step).where(_SPAN)
_FIRST = select(rows.c.step).where(_OF_JOB).order_by(rows.c.step).limit(1)
_LAST = select(rows.c.step).where(_OF_JOB).order_by(rows.c.step.desc()).limit(1)
_FORGET_OLDER = delete(rows).where(_SPAN, rows.c.attempt < bindparam("newest"))
_FORGET_ONE = delete(rows).where(_OF_JOB, rows.c.step == bindparam("at"), rows.c.rank == bindparam("of"))


def store_steps(connection: Connection, job_id: str, attempt: int, told: Iterable[tuple[int, StepMetrics]]) -> None:
    """Store each ``(rank, step)``; of a step that is told twice the later word counts."""
    store_array(connection, job_id, step_array(attempt, told))


def store_array(connection: Connection, job_id: str, told: Steps) -> None:
    """Store steps of one attempt, which must be the job's newest; of a step told twice the later word counts.

    Where earlier attempts have been between the first and the last of these steps, all they said there goes.
    Cost: 10 us a step that becomes a row, 1 us one that goes right into a chunk.
    Raises: ValueError for a step below 0.
    """
    if not len(told):
        return
    if told["step"].min() < 0:
        raise ValueError(f"step {told['step'].min()} cannot be; steps count from 0")
    told = latest(told)
    freed = _make_room(connection, job_id, told)
    _keep(connection, job_id, latest(np.concatenate((freed, told))))


def rows_between(connection: Connection, job_id: str) -> list[int]:
    """The first and the last step that are kept as rows, or nothing."""
    found = [connection.execute(end, {"job": job_id}).scalar() for end in (_FIRST, _LAST)]
    return [end for end in found if end is not None]


def _make_room(connection: Connection, job_id: str, told: Steps) -> Steps:
    """Delete what ``told`` replaces, and return what else was in the chunks that had to be opened for it."""
    first, last = int(told["step"].min()), int(told["step"].max())
    attempt = int(told["attempt"][0])
    if attempt > 1:
        connection.execute(_FORGET_OLDER, {"job": job_id, "first": first, "last": last, "newest": attempt})
    repeated = set(keys(told).tolist()).intersection(_keys_of_rows(connection, job_id, first, last))
    if repeated:
        connection.execute(_FORGET_ONE, [{"job": job_id, "at": k & 0xFFFFFFFF, "of": k >> 32} for k in repeated])
    met = [extent for extent in extents(connection, job_id, first, last) if _is_met(extent, told)]
    freed = take_chunks(connection, job_id, met)
    replaced = (freed["attempt"] < attempt) & (freed["step"] >= first) & (freed["step"] <= last)
    return freed[~replaced]


def _is_met(extent: Extent, told: Steps) -> bool:
    """Whether a chunk that overlaps the span of ``told`` holds what goes, or lies where its rank's steps shall."""
    if extent.first_attempt < told["attempt"][0]:
        return True
    of_rank = told["step"][told["rank"] == extent.rank]
    return len(of_rank) > 0 and bool(of_rank[0] <= extent.last_step and of_rank[-1] >= extent.first_step)


def _keys_of_rows(connection: Connection, job_id: str, first: int, last: int) -> list[int]:
    found = connection.execute(_KEYS, {"job": job_id, "first": first, "last": last})
    return [rank << 32 | step for rank, step in found]


def _keep(connection: Connection, job_id: str, fresh: Steps) -> None:
    """Add steps of which nothing is stored; the oldest become chunks where a rank has too many rows."""
    border = _border(connection, job_id, fresh)
    if border is not None:
        old = and_(rows.c.job_id == job_id, rows.c.step < border)
        moved = np.concatenate((_read_rows(connection, old), fresh[fresh["step"] < border]))
        connection.execute(delete(rows).where(old))
        write_chunks(connection, job_id, moved[np.argsort(keys(moved))])
        fresh = fresh[fresh["step"] >= border]
    _insert_rows(connection, job_id, fresh)


def _border(connection: Connection, job_id: str, fresh: Steps) -> int | None:
    """The step before which rows shall become chunks; None while there are few."""
    most = min(MAX_ROWS_OF_RANK, MAX_ROWS // len(np.unique(fresh["rank"])))
    ends = [*rows_between(connection, job_id), int(fresh["step"].min()), int(fresh["step"].max())]
    if max(ends) - min(ends) < most:
        return None  # a rank has at most one row a step
    stored = np.array(_keys_of_rows(connection, job_id, 0, LAST_STEP), dtype=np.int64)
    return _oldest_to_keep(np.concatenate((stored, keys(fresh))), most)


def _oldest_to_keep(found: NDArray[np.int64], most: int) -> int | None:
    """The step from which on the rank with the most rows has a fifth of ``most``, if it has more than ``most``."""
    ranks, counts = np.unique(found >> 32, return_counts=True)
    if counts.max() <= most:
        return None
    of_fullest = np.sort(found[found >> 32 == ranks[counts.argmax()]])
    return int(of_fullest[-max(most // 5, 1)]) & 0xFFFFFFFF


def _read_rows(connection: Connection, wanted: ColumnElement[bool]) -> Steps:
    c = rows.c
    # numpy reads NULL, which stands for NaN, as NaN.
    measures = (type_coerce(column, Double) for column in (c.loss, c.learning_rate, c.step_s))
    query = select(c.rank, c.step, c.attempt, c.epoch, *measures).where(wanted)
    return np.array([tuple(row) for row in connection.execute(query)], dtype=STEP)


def _insert_rows(connection: Connection, job_id: str, fresh: Steps) -> None:
    if len(fresh):
        names = STEP.names or ()
        connection.execute(
            insert(rows), [{"job_id": job_id, **dict(zip(names, row, strict=True))} for row in fresh.tolist()]
        )
