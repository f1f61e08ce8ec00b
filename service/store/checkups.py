"""What a job found out about itself over its life; of a step that several attempts came to, what the latest told."""

import json
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, select

from service.jobs import CheckpointSaved, Drift, Evaluation, RankStarted, Telemetry
from service.store.events import bodies_of_type
from service.store.schema import events

FactT = TypeVar("FactT", bound=Telemetry)

_Checkup = TypeVar("_Checkup", Evaluation, Drift)


def evaluations_of(connection: Connection, job_id: str) -> list[Evaluation]:
    """Every evaluation in order of steps."""
    return _by_step(connection, job_id, "evaluation", Evaluation)


def drift_of(connection: Connection, job_id: str) -> list[Drift]:
    """Every drift measurement in order of steps."""
    return _by_step(connection, job_id, "drift", Drift)


def start_of(connection: Connection, job_id: str) -> RankStarted | None:
    """What a rank of the newest attempt said when it was ready; None before any was."""
    told = bodies_of_type(connection, job_id, "rank_started")
    return RankStarted.model_validate_json(told[-1][1]) if told else None


def checkpoints_of(connection: Connection, job_id: str) -> list[CheckpointSaved]:
    """Every checkpoint in order of steps, less those that a later attempt dropped by saving an earlier step."""
    saved: list[CheckpointSaved] = []
    for _, body in bodies_of_type(connection, job_id, "checkpoint"):
        checkpoint = CheckpointSaved.model_validate_json(body)
        saved = [other for other in saved if other.step < checkpoint.step] + [checkpoint]
    return saved


def facts_of(connection: Connection, job_id: str, kind: type[FactT]) -> list[tuple[int, FactT]]:
    """Every fact of one kind with the rank that told it, in the order told."""
    c = events.c
    of_kind = (c.job_id == job_id, c.type == kind.model_fields["type"].default)
    found = connection.execute(select(c.rank, c.body).where(*of_kind).order_by(c.seq))
    return [(rank, kind.model_validate_json(body)) for rank, body in found]


def evaluated_at(connection: Connection, job_id: str) -> dict[int, datetime]:
    """When the evaluation at each step was; of a repeated step the first."""
    c = events.c
    query = select(c.time, c.body).where(c.job_id == job_id, c.type == "evaluation").order_by(c.seq.desc())
    return {json.loads(body)["step"]: time for time, body in connection.execute(query)}


def _by_step(connection: Connection, job_id: str, event_type: str, kind: type[_Checkup]) -> list[_Checkup]:
    latest: dict[int, tuple[int, _Checkup]] = {}
    for attempt, body in bodies_of_type(connection, job_id, event_type):
        checkup = kind.model_validate_json(body)
        if checkup.step not in latest or latest[checkup.step][0] <= attempt:
            latest[checkup.step] = (attempt, checkup)
    return [latest[step][1] for step in sorted(latest)]
