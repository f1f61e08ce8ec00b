"""Jobs as they stand, and the changes of state that only one writer can win."""

import json
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, select, update

from service.errors import Conflict, NotFound
from service.jobs import TRANSITIONS, Job, JobSpec, JobState, Phase, Progress, Reason, ReasonClass
from service.store.events import PHASE_CHANGED, STATE_CHANGED, NewEvent, append_events, bodies_of_type
from service.store.leases import Lease, require_lease
from service.store.schema import jobs

SILENCE = timedelta(seconds=15)
"""Three heartbeats of 5 s; runners report more often than that. A longer silence makes a job stale."""


def job_of_row(row: Row[Any], now: datetime, spec: JobSpec | None = None) -> Job:
    """The view of a stored job at the time ``now``; its spec need not be parsed again where it is known."""
    state = JobState(row.state)
    silence = None if row.heartbeat_at is None else max(now - row.heartbeat_at, timedelta(0))
    return Job(
        id=row.id,
        spec=JobSpec.model_validate_json(row.spec) if spec is None else spec,
        owner=row.owner,
        state=state,
        phase=row.phase,
        reason=row.reason,
        detail=row.detail,
        state_since=row.state_since,
        stop_saves=row.stop_saves,
        attempt=row.attempt,
        progress=None if row.progress is None else Progress.model_validate_json(row.progress),
        queue_position=row.queue_position,
        retry_of=row.retry_of,
        start_checkpoint=row.start_checkpoint,
        checkpoint_requests=row.checkpoint_requests,
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


def get_job(connection: Connection, job_id: str, now: datetime, *, lock: bool = False) -> Job:
    """The job; with ``lock`` nobody else can change it until the transaction ends. Raises NotFound."""
    query = select(jobs).where(jobs.c.id == job_id)
    # Rows that refer to the job's may still be added meanwhile: their keys do not change.
    row = connection.execute(query.with_for_update(key_share=True) if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return job_of_row(row, now)


def require_job(connection: Connection, job_id: str) -> None:
    """Raise NotFound where there is no such job."""
    if connection.execute(select(jobs.c.id).where(jobs.c.id == job_id)).one_or_none() is None:
        raise NotFound(f"there is no job {job_id}")


def unfinished_jobs(connection: Connection, now: datetime, known: Mapping[tuple[str, int], JobSpec]) -> list[Job]:
    """Every job that is not terminal, oldest first; ``known`` are specs by id and version, which never change."""
    states = [state for state in JobState if not state.terminal]
    query = select(jobs).where(jobs.c.state.in_(states)).order_by(jobs.c.created_at, jobs.c.id)
    return [job_of_row(row, now, known.get((row.id, row.version))) for row in connection.execute(query)]


def count_jobs(connection: Connection, owner: str, states: Collection[JobState]) -> int:
    """How many of the owner's jobs are in any of ``states``."""
    query = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(sorted(states)))
    return connection.execute(query).scalar_one()


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
    stop_saves: bool = False,
    spec: JobSpec | None = None,
    lease: Lease | None = None,
) -> Job:
    """Move the job on if it is still what the caller saw, and the caller still the holder of ``lease``.

    Raises: Conflict where the table of transitions has no such step, or another writer was first; LeaseLost.
    """
    if to not in TRANSITIONS[job.state]:
        raise Conflict(f"{job.id} is {job.state}; from there it cannot become {to}")
    changes: dict[str, Any] = {
        "state": to,
        "phase": None if to.terminal else phase,
        "reason": reason,
        "detail": detail,
        "state_since": now,
        "stop_saves": stop_saves and to is JobState.CANCELLING,
        "queue_position": None,
        "updated_at": now,
    }
    if spec is not None:
        changes["spec"] = spec.model_dump_json()
    if new_attempt:
        changes |= {"attempt": job.attempt + 1, "heartbeat_at": None}
    if to is JobState.RUNNING and job.started_at is None:
        changes["started_at"] = now
    if to.terminal:
        changes["finished_at"] = now
    require_lease(connection, lease)
    compare_and_set(connection, job, changes, now)
    attempt = changes.get("attempt", job.attempt)
    event = state_changed(now, job.state, to, attempt, changes["phase"], reason, detail)
    append_events(connection, job.id, [event])
    return get_job(connection, job.id, now)


def compare_and_set(connection: Connection, job: Job, changes: dict[str, Any], now: datetime) -> None:
    """Change the job, and count the change, if it still has the state and version that the caller saw.

    One statement compares and sets, so of writers that saw the same version one wins. Raises: Conflict.
    """
    unchanged = (jobs.c.id == job.id, jobs.c.version == job.version, jobs.c.state == job.state)
    changed = update(jobs).where(*unchanged).values(changes | {"version": job.version + 1})
    if connection.execute(changed).rowcount != 1:
        current = get_job(connection, job.id, now)
        raise Conflict(f"{job.id} has changed meanwhile: it is {current.state}, version {current.version}")


def describe_job(
    connection: Connection,
    job_id: str,
    *,
    phase: Phase | EllipsisType | None,
    reason: Reason | EllipsisType | None,
    detail: str | EllipsisType,
    now: datetime,
    version: int | None = None,
    lease: Lease | None = None,
) -> Job:
    """Change what is said of a job that is not terminal, with an event if anything changed; ``...`` leaves as is.

    With ``version``, only while the job still has it: what was true of a queued job may not be of a paused one. The
    job is locked from being read on, so that it cannot become terminal before it is written. Raises: LeaseLost.
    """
    require_lease(connection, lease)
    job = get_job(connection, job_id, now, lock=True)
    said: dict[str, Any] = {"phase": job.phase, "reason": job.reason, "detail": job.detail}
    wanted = {"phase": phase, "reason": reason, "detail": detail}
    changes = {name: value for name, value in wanted.items() if value is not ... and value != said[name]}
    if job.state.terminal or not changes or version not in (None, job.version):
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


def state_changed(
    now: datetime,
    before: JobState | None,
    to: JobState,
    attempt: int,
    phase: Phase | None,
    reason: Reason | None,
    detail: str,
) -> NewEvent:
    """The event that tells a change of state; ``before`` is None at the job's birth."""
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


def set_observed(connection: Connection, job_ids: Collection[str], now: datetime) -> None:
    """Remember that the cluster has answered about these jobs, which are locked in the order of their ids."""
    observed = update(jobs).where(jobs.c.id == bindparam("of_job")).values(observed_at=now)
    if job_ids:
        connection.execute(observed, [{"of_job": job_id} for job_id in sorted(job_ids)])
