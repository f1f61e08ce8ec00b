"""Chunks: stretches of a rank's steps, each kept as one row of packed columns.

A rank's chunks do not overlap, and none of its steps that are kept as rows lies within one of them. So a rank's
series is its chunks in order, and a step is in one place only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, and_, bindparam, delete, insert, select

from service.store.schema import metric_chunks
from service.store.step_arrays import FIELDS, STEP, Steps, pack, unpack

CHUNK_ROWS = 2048
"""The most steps in one chunk. Half as many cost a third more space, twice as many gain 2 %."""

LAST_STEP = 2**31 - 1
"""No step is beyond."""

_C = metric_chunks.c
# Each ingest asks, and to build such a query anew takes longer than to answer it.
_OVERLAPPING = and_(
    _C.job_id == bindparam("job"), _C.last_step >= bindparam("first"), _C.first_step <= bindparam("last")
)
_EXTENTS = (
    select(_C.rank, _C.first_step, _C.last_step, _C.num_rows, _C.first_attempt)
    .where(_OVERLAPPING)
    .order_by(_C.last_step)
)


@dataclass(frozen=True)
class Extent:
    """Where a chunk lies, without what is in it."""

    rank: int
    first_step: int
    last_step: int
    num_rows: int
    first_attempt: int
    """The oldest attempt that any of its steps is of."""


def extents(
    connection: Connection, job_id: str, first_step: int = 0, last_step: int = LAST_STEP, rank: int | None = None
) -> list[Extent]:
    """Chunks of the job, or of one rank, that reach between the steps, both included; in order of their last step."""
    query = _EXTENTS if rank is None else _EXTENTS.where(metric_chunks.c.rank == rank)
    return [Extent(*row) for row in connection.execute(query, _between(job_id, first_step, last_step))]


def read_column(
    connection: Connection, job_id: str, first_step: int, last_step: int, rank: int | None, field: str
) -> Iterator[tuple[NDArray[np.generic], NDArray[np.generic]]]:
    """Steps and values of one field of each chunk that `extents` would name, in no particular order."""
    query = select(metric_chunks.c.step, metric_chunks.c[field]).where(_OVERLAPPING)
    if rank is not None:
        query = query.where(metric_chunks.c.rank == rank)
    for steps, values in connection.execute(query, _between(job_id, first_step, last_step)):
        yield unpack(steps, "step"), unpack(values, field)


def take_chunks(connection: Connection, job_id: str, chosen: list[Extent]) -> Steps:
    """The steps in these chunks, which are chunks no longer."""
    taken = [np.empty(0, STEP)]
    for extent in chosen:
        c = metric_chunks.c
        this = and_(c.job_id == job_id, c.rank == extent.rank, c.first_step == extent.first_step)
        row = connection.execute(select(*(c[field] for field in FIELDS)).where(this)).one()
        steps = np.empty(extent.num_rows, STEP)
        steps["rank"] = extent.rank
        for field in FIELDS:
            steps[field] = unpack(getattr(row, field), field)
        taken.append(steps)
        connection.execute(delete(metric_chunks).where(this))
    return np.concatenate(taken)


def write_chunks(connection: Connection, job_id: str, steps: Steps) -> None:
    """Keep these steps as chunks: sorted by rank and step, none of them within a chunk that is there.

    A chunk before them that has room is filled up first, so that chunks stay few however the steps come.
    """
    present: dict[int, list[Extent]] = {}
    for extent in extents(connection, job_id):
        present.setdefault(extent.rank, []).append(extent)
    rows = []
    for rank, of_rank in _by_rank(steps):
        for before, stretch in _stretches(of_rank, present.get(rank, [])):
            if before is not None and before.num_rows + len(stretch) <= CHUNK_ROWS:
                stretch = np.concatenate((take_chunks(connection, job_id, [before]), stretch))
            pieces = (stretch[at : at + CHUNK_ROWS] for at in range(0, len(stretch), CHUNK_ROWS))
            rows += [_row(job_id, rank, piece) for piece in pieces]
    if rows:
        connection.execute(insert(metric_chunks), rows)


def _between(job_id: str, first_step: int, last_step: int) -> dict[str, object]:
    return {"job": job_id, "first": first_step, "last": last_step}


def _by_rank(steps: Steps) -> Iterator[tuple[int, Steps]]:
    borders = np.flatnonzero(np.diff(steps["rank"])) + 1
    for of_rank in np.split(steps, borders):
        if len(of_rank):
            yield int(of_rank["rank"][0]), of_rank


def _stretches(steps: Steps, present: list[Extent]) -> Iterator[tuple[Extent | None, Steps]]:
    """The stretches of ``steps`` that no chunk interrupts, each with the chunk before it."""
    borders = np.searchsorted(steps["step"], [extent.first_step for extent in present])
    for before, stretch in zip([None, *present], np.split(steps, borders), strict=True):
        if len(stretch):
            yield before, stretch


def _row(job_id: str, rank: int, steps: Steps) -> Mapping[str, object]:
    return {
        "job_id": job_id,
        "rank": rank,
        "first_step": int(steps["step"][0]),
        "last_step": int(steps["step"][-1]),
        "num_rows": len(steps),
        "first_attempt": int(steps["attempt"].min()),
        **{field: pack(steps[field]) for field in FIELDS},
    }
