"""Chunks: stretches of a rank's steps, each kept as one row of packed columns.

A rank's chunks do not overlap, and none of its steps that are kept as rows lies within one of them. So a rank's
series is its chunks in order, and a step is in one place only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select

from service.store.schema import metric_chunks
from service.store.step_arrays import FIELDS, STEP, Steps, pack, unpack

CHUNK_ROWS = 2048
"""The most steps in one chunk. Half as many cost a third more space, twice as many gain 2 %."""


@dataclass(frozen=True)
class Extent:
    """Where a chunk lies, without what is in it."""

    rank: int
    first_step: int
    last_step: int
    num_rows: int
    first_attempt: int
    """The oldest attempt that any of its steps is of."""


def overlapping(job_id: str, first_step: int, last_step: int, rank: int | None = None) -> ColumnElement[bool]:
    """Chunks of the job, or of one of its ranks, that have steps between the two, both included."""
    c = metric_chunks.c
    wanted = and_(c.job_id == job_id, c.last_step >= first_step, c.first_step <= last_step)
    return wanted if rank is None else and_(wanted, c.rank == rank)


def extents(connection: Connection, wanted: ColumnElement[bool]) -> list[Extent]:
    """The chunks in order of their last step."""
    c = metric_chunks.c
    query = select(c.rank, c.first_step, c.last_step, c.num_rows, c.first_attempt).where(wanted)
    return [Extent(*row) for row in connection.execute(query.order_by(c.last_step))]


def read_column(
    connection: Connection, wanted: ColumnElement[bool], field: str
) -> Iterator[tuple[int, NDArray[np.generic], NDArray[np.generic]]]:
    """Rank, steps and the values of one field of each chunk, in order of ranks and steps."""
    c = metric_chunks.c
    query = select(c.rank, c.step, c[field]).where(wanted).order_by(c.rank, c.first_step)
    for rank, steps, values in connection.execute(query):
        yield rank, unpack(steps, "step"), unpack(values, field)


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
    for extent in extents(connection, metric_chunks.c.job_id == job_id):
        present.setdefault(extent.rank, []).append(extent)
    rows = []
    for rank, of_rank in _by_rank(steps):
        for before, stretch in _between(of_rank, present.get(rank, [])):
            if before is not None and before.num_rows + len(stretch) <= CHUNK_ROWS:
                stretch = np.concatenate((take_chunks(connection, job_id, [before]), stretch))
            pieces = (stretch[at : at + CHUNK_ROWS] for at in range(0, len(stretch), CHUNK_ROWS))
            rows += [_row(job_id, rank, piece) for piece in pieces]
    if rows:
        connection.execute(insert(metric_chunks), rows)


def _by_rank(steps: Steps) -> Iterator[tuple[int, Steps]]:
    borders = np.flatnonzero(np.diff(steps["rank"])) + 1
    for of_rank in np.split(steps, borders):
        if len(of_rank):
            yield int(of_rank["rank"][0]), of_rank


def _between(steps: Steps, present: list[Extent]) -> Iterator[tuple[Extent | None, Steps]]:
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
