"""Reading metrics: one number over steps, of one rank or as the mean over ranks, from rows and chunks alike."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Double, and_, bindparam, select, type_coerce

from service.errors import NotFound
from service.jobs import MetricSeries
from service.store.chunks import LAST_STEP, extents, read_column
from service.store.downsample import downsample, means_of_stretches
from service.store.schema import metric_chunks, steps
from service.store.steps import rows_between

LOSS = "train/loss"

_FIELDS = {LOSS: "loss", "train/learning_rate": "learning_rate", "train/step_s": "step_s"}

WINDOW_ROWS = 2**18
"""Longer series are read in windows of about so many steps of ranks, which bounds what is in memory at once."""

_LOSSES = select(steps.c.loss).where(steps.c.job_id == bindparam("job"), steps.c.step == bindparam("at"))

Points = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps, ascending, and the value at each."""


def metric_names(connection: Connection, job_id: str) -> list[str]:
    """The metrics that the job has points of."""
    tables = (steps, metric_chunks)
    found = any(connection.execute(select(t.c.job_id).where(t.c.job_id == job_id).limit(1)).first() for t in tables)
    return sorted(_FIELDS) if found else []


def metric_series(
    connection: Connection,
    job_id: str,
    name: str,
    rank: int | None,
    first_step: int | None,
    last_step: int | None,
    max_points: int | None,
) -> MetricSeries:
    """One metric over steps, of one rank or as the mean over ranks; the mean is NaN where any rank is.

    ``num_points`` is the number of points in the range, of which at most ``max_points`` are told.
    Cost: reads the range and nothing else, holding 16 bytes a step and a window of rows. Raises: NotFound.
    """
    if name not in _FIELDS:
        raise NotFound(f"there is no metric {name!r}; there are {', '.join(sorted(_FIELDS))}")
    windows = list(_windows(connection, job_id, _FIELDS[name], rank, first_step, last_step))
    numbers = np.concatenate([np.empty(0, np.int64), *(numbers for numbers, _ in windows)])
    values = np.concatenate([np.empty(0, np.float64), *(values for _, values in windows)])
    kept = np.arange(len(values)) if max_points is None else downsample(values, max_points)
    return MetricSeries(
        name=name,
        rank=rank,
        steps=tuple(numbers[kept].tolist()),
        values=tuple(values[kept].tolist()),
        num_points=len(values),
        downsampled=None if len(kept) == len(values) else "least and greatest value of each bucket of steps",
    )


def whole_loss(connection: Connection, job_id: str, max_points: int) -> MetricSeries:
    """The training loss of the whole run as the mean over ranks; of more than ``max_points`` steps in means.

    Cost: 24 bytes for each of ``max_points`` and a window of rows, however long the run is.
    """
    ends = _ends(connection, job_id)
    if ends is None or ends[1] - ends[0] < max_points:
        return metric_series(connection, job_id, LOSS, None, None, None, None)
    windows = _windows(connection, job_id, _FIELDS[LOSS], None, None, None)
    length = -(-(ends[1] - ends[0] + 1) // max_points)
    numbers, values, num_points = means_of_stretches(windows, *ends, length)
    return MetricSeries(
        name=LOSS,
        rank=None,
        steps=tuple(numbers.tolist()),
        values=tuple(values.tolist()),
        num_points=num_points,
        downsampled=f"means of {length} consecutive steps",
    )


def mean_loss(connection: Connection, job_id: str, step: int) -> float | None:
    """The training loss at one step, as the mean over ranks; None where no rank has told it."""
    losses = connection.execute(_LOSSES, {"job": job_id, "at": step}).scalars().all()
    if extents(connection, job_id, step, step):
        losses = _points(connection, job_id, _FIELDS[LOSS], None, step, step)[1].tolist()
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.mean(losses)) if losses else None


def _windows(
    connection: Connection, job_id: str, field: str, rank: int | None, first_step: int | None, last_step: int | None
) -> Iterator[Points]:
    """The points in order, in stretches that are small enough to hold."""
    start, end = first_step or 0, LAST_STEP if last_step is None else last_step
    num_rows = 0
    for extent in extents(connection, job_id, start, end, rank):
        num_rows += extent.num_rows
        if num_rows >= WINDOW_ROWS and extent.last_step < end:
            yield _points(connection, job_id, field, rank, start, extent.last_step)
            start, num_rows = extent.last_step + 1, 0
    yield _points(connection, job_id, field, rank, start, end)


def _ends(connection: Connection, job_id: str) -> tuple[int, int] | None:
    """The first and the last step of the job."""
    found = [end for end in rows_between(connection, job_id) if end is not None]
    for extent in extents(connection, job_id):
        found += [extent.first_step, extent.last_step]
    return (min(found), max(found)) if found else None


def _points(connection: Connection, job_id: str, field: str, rank: int | None, first: int, last: int) -> Points:
    """The points between two steps, both included."""
    numbers, values = [np.empty(0, np.int64)], [np.empty(0, np.float64)]
    for of_chunk, values_of_chunk in read_column(connection, job_id, first, last, rank, field):
        inside = slice(*np.searchsorted(of_chunk, [first, last + 1]))
        numbers.append(of_chunk[inside].astype(np.int64))
        values.append(values_of_chunk[inside].astype(np.float64))
    query = select(steps.c.step, type_coerce(steps.c[field], Double)).where(
        and_(steps.c.job_id == job_id, steps.c.step.between(first, last))
    )
    if rank is not None:
        query = query.where(steps.c.rank == rank)
    # numpy reads NULL, which stands for NaN, as NaN.
    rows = np.array([tuple(row) for row in connection.execute(query)], dtype=np.float64).reshape(-1, 2)
    numbers.append(rows[:, 0].astype(np.int64))
    values.append(rows[:, 1])
    return _mean_by_step(np.concatenate(numbers), np.concatenate(values))


def _mean_by_step(numbers: NDArray[np.int64], values: NDArray[np.float64]) -> Points:
    # Databases pass over NULL in a mean, and would hide the one rank that has diverged; here a NaN stays one.
    order = np.argsort(numbers, kind="stable")
    found, starts, counts = np.unique(numbers[order], return_index=True, return_counts=True)
    if not len(found):
        return found, values
    with np.errstate(invalid="ignore", over="ignore"):
        return found, np.add.reduceat(values[order], starts) / counts
