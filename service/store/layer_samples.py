"""Samples of the BatchNorm layers, each a small compressed document: beside the events, which they would swamp."""

import json
import zlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from service.jobs import BatchNormSample
from service.store.schema import layer_samples

_LEVEL = 6
"""Of zlib: a sample of 19 layers takes 0.6 ms and becomes about a fifth; the next levels gain 2 %."""


def store_samples(connection: Connection, job_id: str, attempt: int, told: Sequence[BatchNormSample]) -> None:
    """Store what an attempt tells; of a step that it tells twice the later word counts."""
    latest = {sample.step: sample for sample in told}
    if not latest:
        return
    c = layer_samples.c
    connection.execute(
        delete(layer_samples).where(c.job_id == job_id, c.attempt == attempt, c.step.in_(sorted(latest)))
    )
    rows = [
        {"job_id": job_id, "attempt": attempt, "step": step, "body": _pack(latest[step])} for step in sorted(latest)
    ]
    connection.execute(insert(layer_samples), rows)


def samples_of(
    connection: Connection, job_id: str, first_step: int | None = None, last_step: int | None = None
) -> list[BatchNormSample]:
    """Every sample between two steps, both included, in order; of a step that attempts repeat, the latest one's."""
    return [BatchNormSample.model_validate_json(body) for _, body in _bodies(connection, job_id, first_step, last_step)]


def raw_samples(
    connection: Connection, job_id: str, first_step: int | None, last_step: int | None
) -> list[tuple[int, dict[str, Any]]]:
    """Step and JSON of the same samples, unchecked: a tenth of the time where only some numbers are wanted."""
    return [(step, json.loads(body)) for step, body in _bodies(connection, job_id, first_step, last_step)]


def last_sample(connection: Connection, job_id: str) -> BatchNormSample | None:
    """The newest sample of the newest attempt that told any; None before."""
    c = layer_samples.c
    query = select(c.body).where(c.job_id == job_id).order_by(c.attempt.desc(), c.step.desc()).limit(1)
    body = connection.execute(query).scalar()
    return None if body is None else BatchNormSample.model_validate_json(zlib.decompress(body))


def _bodies(
    connection: Connection, job_id: str, first_step: int | None, last_step: int | None
) -> list[tuple[int, bytes]]:
    c = layer_samples.c
    query = select(c.step, c.body).where(c.job_id == job_id)
    if first_step is not None:
        query = query.where(c.step >= first_step)
    if last_step is not None:
        query = query.where(c.step <= last_step)
    latest: dict[int, bytes] = {}
    for step, body in connection.execute(query.order_by(c.attempt)):
        latest[step] = body
    return [(step, zlib.decompress(latest[step])) for step in sorted(latest)]


def _pack(sample: BatchNormSample) -> bytes:
    return zlib.compress(sample.model_dump_json().encode(), _LEVEL)
