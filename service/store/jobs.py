"""Jobs: birth, views, and the changes of state that only one writer can win."""

import hashlib
import json
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from service.errors import Conflict, FieldProblem, InvalidRequest, NotFound
from service.jobs import TRANSITIONS, Job, JobSpec, JobState, Phase, Progress, Reason, ReasonClass, new_job_id
from service.store.events import PHASE_CHANGED, STATE_CHANGED, NewEvent, append_events, bodies_of_type
from service.store.schema import idempotency_keys, jobs

SILENCE = timedelta(seconds=15)
"""Three heartbeats of 5 s; runners report more often than that. A longer silence makes a job stale."""

_MAX_KEY_LENGTH = 255


def job_of_row(row: Row[Any], now: datetime) -> Job:
    """The view of a stored job at the time ``now``."""
    state = JobState(row.state)
    silence = None if row.heartbeat_at is None else max(now - row.heartbeat_at, timedelta(0))
    return Job(
        id=row.id,
        spec=JobSpec.model_validate_json(row.spec),
        state=state,
        phase=row.phase,
        reason=row.reason,
        detail=row.detail,
        attempt=row.attempt,
        progress=None if row.progress is None else Progress.model_validate_json(row.progress),
        version=row.version,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        observed_at=row.observed_at,
        heartbeat_at=row.heartbeat_at,
        heartbeat_age_s=None if silence is None else silence.total_seconds(),
        stale=state.active and silence is not None and silence > SILENCE,
    )


def get_job(connection: Connection, job_id: str, now: datetime) -> Job:
    """The job. Raises NotFound."""
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return job_of_row(row, now)


def require_job(connection: Connection, job_id: str) -> None:
    """Raise NotFound where there is no such job."""
    if connection.execute(select(jobs.c.id).where(jobs.c.id == job_id)).one_or_none() is None:
        raise NotFound(f"there is no job {job_id}")


def unfinished_jobs(connection: Connection, now: datetime) -> list[Job]:
    """Every job that is not terminal, oldest first."""
    states = [state for state in JobState if not state.terminal]
    query = select(jobs).where(jobs.c.state.in_(states)).order_by(jobs.c.created_at, jobs.c.id)
    return [job_of_row(row, now) for row in connection.execute(query)]


def create_job(connection: Connection, spec: JobSpec, idempotency_key: str | None, now: datetime) -> tuple[Job, bool]:
    """A queued job with its first event, or the job that was made under the same key before."""
    earlier = None if idempotency_key is None else recall_job(connection, spec, idempotency_key, now)
    if earlier is not None:
        return earlier, False
    job_id = _insert_job(connection, spec, now)
    if idempotency_key is not None:
        record = {"key": idempotency_key, "job_id": job_id, "spec_sha256": _fingerprint(spec), "created_at": now}
        connection.execute(insert(idempotency_keys).values(record))
    return get_job(connection, job_id, now), True


def recall_job(connection: Connection, spec: JobSpec, key: str, now: datetime) -> Job | None:
    """The job that was made under this key, if any. Raises InvalidRequest where it was made of another spec."""
    if not 1 <= len(key) <= _MAX_KEY_LENGTH or not key.isprintable() or not key.isascii():
        text = f"must be 1 to {_MAX_KEY_LENGTH} printable ASCII letters"
        raise InvalidRequest([FieldProblem("/Idempotency-Key", "idempotency_key_invalid", text)])
    row = connection.execute(select(idempotency_keys).where(idempotency_keys.c.key == key)).one_or_none()
    if row is None:
        return None
    if row.spec_sha256 != _fingerprint(spec):
        text = f"was used before for another spec, which became {row.job_id}; choose a fresh key"
        raise InvalidRequest([FieldProblem("/Idempotency-Key", "idempotency_key_reused", text)])
    return get_job(connection, row.job_id, now)


def _fingerprint(spec: JobSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def _insert_job(connection: Connection, spec: JobSpec, now: datetime) -> str:
    job_id = new_job_id()
    connection.execute(
        insert(jobs).values(
            id=job_id,
            name=spec.name,
            spec=spec.model_dump_json(),
            state=JobState.QUEUED,
            detail="",
            attempt=0,
            version=1,
            num_events=0,
            num_logs=0,
            created_at=now,
            updated_at=now,
        )
    )
    append_events(connection, job_id, [_state_changed(now, None, JobState.QUEUED, 0, None, None, "")])
    return job_id


def change_state(
    connection: Connection,
    job: Job,
    to: JobState,
    *,
    phase: Phase | None,
    reason: Reason | None,
    detail: str,
    now: datetime,
    new_attempt: bool = False,
) -> Job:
    """Move the job on if it is still what the caller saw: the same state and version.

    Raises: Conflict where the table of transitions has no such step, or another writer was first.
    """
    if to not in TRANSITIONS[job.state]:
        raise Conflict(f"{job.id} is {job.state}; from there it cannot become {to}")
    changes: dict[str, Any] = {
        "state": to,
        "phase": None if to.terminal else phase,
        "reason": reason,
        "detail": detail,
        "version": job.version + 1,
        "updated_at": now,
    }
    if new_attempt:
        changes |= {"attempt": job.attempt + 1, "heartbeat_at": None}
    if to is JobState.RUNNING and job.started_at is None:
        changes["started_at"] = now
    if to.terminal:
        changes["finished_at"] = now
    unchanged = (jobs.c.id == job.id, jobs.c.version == job.version, jobs.c.state == job.state)
    if connection.execute(update(jobs).where(*unchanged).values(changes)).rowcount != 1:
        current = get_job(connection, job.id, now)
        raise Conflict(f"{job.id} has changed meanwhile: it is {current.state}, version {current.version}")
    attempt = changes.get("attempt", job.attempt)
    event = _state_changed(now, job.state, to, attempt, changes["phase"], reason, detail)
    append_events(connection, job.id, [event])
    return get_job(connection, job.id, now)


def describe_job(
    connection: Connection,
    job_id: str,
    *,
    phase: Phase | EllipsisType | None,
    reason: Reason | EllipsisType | None,
    detail: str | EllipsisType,
    now: datetime,
) -> Job:
    """Change what is said of a job that is not terminal, with an event if anything changed; ``...`` leaves as is."""
    job = get_job(connection, job_id, now)
    said: dict[str, Any] = {"phase": job.phase, "reason": job.reason, "detail": job.detail}
    wanted = {"phase": phase, "reason": reason, "detail": detail}
    changes = {name: value for name, value in wanted.items() if value is not ... and value != said[name]}
    if job.state.terminal or not changes:
        return job
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(**changes, updated_at=now))
    append_events(connection, job_id, [phase_changed(now, job.attempt or None, **(said | changes))])
    return get_job(connection, job_id, now)


def phase_changed(
    time: datetime,
    attempt: int | None,
    *,
    phase: object,
    reason: object,
    detail: object,
    rank: int | None = None,
) -> NewEvent:
    """The event that tells what is now said of a job."""
    body = json.dumps({"phase": phase, "reason": reason, "detail": detail})
    return NewEvent(time, PHASE_CHANGED, body, attempt, rank)


def _state_changed(
    now: datetime,
    before: JobState | None,
    to: JobState,
    attempt: int,
    phase: Phase | None,
    reason: Reason | None,
    detail: str,
) -> NewEvent:
    body = {"from": before, "to": to, "reason": reason, "detail": detail, "phase": phase}
    return NewEvent(now, STATE_CHANGED, json.dumps(body), attempt or None)


def count_recoveries(connection: Connection, job_id: str) -> dict[ReasonClass, int]:
    """How often the job went to recovering, by class of reason; classes that never occurred are absent."""
    require_job(connection, job_id)
    counts: dict[ReasonClass, int] = {}
    for _, text in bodies_of_type(connection, job_id, STATE_CHANGED):
        body = json.loads(text)
        if body["to"] == JobState.RECOVERING and body["reason"] is not None:
            reason_class = Reason(body["reason"]).reason_class
            counts[reason_class] = counts.get(reason_class, 0) + 1
    return counts


def set_observed(connection: Connection, job_id: str, now: datetime) -> None:
    """Remember that the cluster has answered about the job."""
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(observed_at=now))
