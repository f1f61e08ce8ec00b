"""Samples of the BatchNorm layers, each a small compressed document: beside the events, which they would swamp."""

import json
import zlib
from collections.abc import Iterator, Sequence
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


def newest_samples(connection: Connection, job_id: str, limit: int) -> list[tuple[int, BatchNormSample]]:
    """The last so many samples with their attempts, in the order in which they were taken: attempt by attempt."""
    c = layer_samples.c
    newest = select(c.attempt, c.body).where(c.job_id == job_id).order_by(c.attempt.desc(), c.step.desc()).limit(limit)
    found = [(attempt, _unpack(body)) for attempt, body in connection.execute(newest)]
    return found[::-1]


def raw_samples(
    connection: Connection, job_id: str, first_step: int | None, last_step: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and JSON of every sample between two steps, both included; of a repeated step the latest attempt's.

    They are not checked, which takes a tenth of the time where only some numbers are wanted.
    """
    c = layer_samples.c
    query = select(c.step, c.body).where(c.job_id == job_id).order_by(c.attempt)
    if first_step is not None:
        query = query.where(c.step >= first_step)
    if last_step is not None:
        query = query.where(c.step <= last_step)
    latest: dict[int, bytes] = {step: body for step, body in connection.execute(query)}
    for step in sorted(latest):
        yield step, json.loads(zlib.decompress(latest[step]))


def _pack(sample: BatchNormSample) -> bytes:
    return zlib.compress(sample.model_dump_json().encode(), _LEVEL)


def _unpack(body: bytes) -> BatchNormSample:
    return BatchNormSample.model_validate_json(zlib.decompress(body))
