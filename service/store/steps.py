"""Per-step metrics of every rank. A step that a later attempt repeats replaces what was there."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from sqlalchemy import Column, Connection, Double, and_, case, delete, func, insert, select, type_coerce

from service.errors import NotFound
from service.jobs import MetricSeries, StepMetrics
from service.store.downsample import downsample
from service.store.schema import steps

_COLUMNS: Mapping[str, Column[float]] = {
    "train/learning_rate": steps.c.learning_rate,
    "train/loss": steps.c.loss,
    "train/step_s": steps.c.step_s,
}


def store_steps(connection: Connection, job_id: str, attempt: int, new: Iterable[tuple[int, StepMetrics]]) -> None:
    """Store each ``(rank, step)``; of a step that is told twice the later word counts."""
    rows = {
        (fact.step, rank): {
            "job_id": job_id,
            "step": fact.step,
            "rank": rank,
            "attempt": attempt,
            "epoch": fact.epoch,
            "loss": fact.loss,
            "learning_rate": fact.learning_rate,
            "step_s": fact.step_s,
        }
        for rank, fact in new
    }
    if not rows:
        return
    _make_room(connection, job_id, attempt, set(rows))
    connection.execute(insert(steps), list(rows.values()))


def _make_room(connection: Connection, job_id: str, attempt: int, wanted: set[tuple[int, int]]) -> None:
    """Delete what earlier attempts said of the span of these steps, and what this attempt said of them before."""
    numbers = [step for step, _ in wanted]
    span = and_(steps.c.job_id == job_id, steps.c.step.between(min(numbers), max(numbers)))
    connection.execute(delete(steps).where(span, steps.c.attempt < attempt))
    present = connection.execute(select(steps.c.step, steps.c.rank).where(span))
    for step, rank in wanted & {(row.step, row.rank) for row in present}:
        chosen = (steps.c.job_id == job_id, steps.c.step == step, steps.c.rank == rank)
        connection.execute(delete(steps).where(*chosen))


def metric_names(connection: Connection, job_id: str) -> list[str]:
    """The metrics that the job has points of."""
    any_step = connection.execute(select(steps.c.step).where(steps.c.job_id == job_id).limit(1)).scalar()
    return [] if any_step is None else sorted(_COLUMNS)


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

    ``num_points`` is the number of points in the range, of which at most ``max_points`` are told. Raises: NotFound.
    """
    if name not in _COLUMNS:
        raise NotFound(f"there is no metric {name!r}; there are {', '.join(sorted(_COLUMNS))}")
    found = _points(connection, job_id, _COLUMNS[name], rank, first_step, last_step)
    # numpy reads NULL, which stands for NaN, as NaN.
    values = np.array([value for _, value in found], dtype=np.float64)
    kept = np.arange(len(values)) if max_points is None else downsample(values, max_points)
    return MetricSeries(
        name=name,
        rank=rank,
        steps=tuple(found[i][0] for i in kept),
        values=tuple(values[kept].tolist()),
        num_points=len(values),
        downsampled=None if len(kept) == len(values) else "least and greatest value of each bucket of steps",
    )


def mean_loss(connection: Connection, job_id: str, step: int) -> float | None:
    """The training loss at one step, as the mean over ranks; None where no rank has told it."""
    found = _points(connection, job_id, steps.c.loss, None, step, step)
    return None if not found else float(np.float64(found[0][1]))


def _points(
    connection: Connection,
    job_id: str,
    column: Column[float],
    rank: int | None,
    first_step: int | None,
    last_step: int | None,
) -> Sequence[tuple[int, float | None]]:
    if rank is not None:
        query = select(steps.c.step, type_coerce(column, Double)).where(steps.c.rank == rank)
    else:
        # The mean as databases take it passes over NULL, and would hide the one rank that has diverged.
        mean = case((func.count(column) < func.count(), None), else_=func.avg(column))
        query = select(steps.c.step, type_coerce(mean, Double)).group_by(steps.c.step)
    query = query.where(steps.c.job_id == job_id)
    if first_step is not None:
        query = query.where(steps.c.step >= first_step)
    if last_step is not None:
        query = query.where(steps.c.step <= last_step)
    return [(step, value) for step, value in connection.execute(query.order_by(steps.c.step))]
