"""What is asked of a job on its way: a checkpoint, other workers, another place in the queue, an end without delay."""

import json
from collections.abc import Mapping
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import Connection, bindparam, select, update

from service.errors import Conflict, FieldProblem, InvalidRequest
from service.jobs import Job, JobSpec, JobState
from service.store.events import (
    CANCEL_FORCED,
    CHECKPOINT_REQUESTED,
    PRIORITY_CHANGED,
    RESIZED,
    NewEvent,
    append_events,
)
from service.store.jobs import change_state, compare_and_set, get_job
from service.store.leases import Lease, require_lease
from service.store.schema import jobs

_MAX_NAMED = 256
"""Up to this number of workers the possible ones are named."""


def request_checkpoint(connection: Connection, job_id: str, now: datetime) -> Job:
    """Ask the job's newest attempt for a checkpoint. The job is locked from being read on.

    Raises: Conflict unless it is starting or running.
    """
    job = get_job(connection, job_id, now, lock=True)
    if job.state not in (JobState.STARTING, JobState.RUNNING):
        raise Conflict(f"{job_id} is {job.state}; only a starting or running job can save a checkpoint")
    number = job.checkpoint_requests + 1
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(checkpoint_requests=number, updated_at=now))
    body = json.dumps({"checkpoint_requests": number})
    append_events(connection, job_id, [NewEvent(now, CHECKPOINT_REQUESTED, body, job.attempt)])
    return get_job(connection, job_id, now)


def force_cancel(connection: Connection, job: Job, now: datetime) -> Job:
    """Let a job that is being cancelled, and would save first, leave without; its next report is told to abort.

    Of writers that saw the same job one wins. Raises: Conflict, also unless it is just saving to be cancelled.
    """
    if job.state is not JobState.CANCELLING or not job.stop_saves:
        raise Conflict(f"{job.id} is {job.state}; only a cancellation that saves first can be forced")
    compare_and_set(connection, job, {"stop_saves": False, "updated_at": now}, now)
    append_events(connection, job.id, [NewEvent(now, CANCEL_FORCED, "{}", job.attempt)])
    return get_job(connection, job.id, now)


def resume_job(connection: Connection, job: Job, num_workers: int | None, now: datetime) -> Job:
    """Queue a paused job again, with its images per step spread over ``num_workers`` if that is given.

    Of writers that saw the same job one wins. Raises: Conflict; InvalidRequest where the images cannot be spread so.
    """
    if job.state is not JobState.PAUSED:
        raise Conflict(f"{job.id} is {job.state}; only a paused job can be resumed")
    spec = job.spec if num_workers is None else _spread(job.spec, num_workers)
    changed = None if spec == job.spec else spec
    resumed = change_state(connection, job, JobState.QUEUED, phase=None, reason=None, detail="", now=now, spec=changed)
    if changed is not None:
        body = {
            name: {"from": getattr(job.spec, name), "to": getattr(spec, name)}
            for name in ("num_workers", "batch_size_per_worker")
        }
        append_events(connection, job.id, [NewEvent(now, RESIZED, json.dumps(body))])
        resumed = get_job(connection, job.id, now)
    return resumed


def _spread(spec: JobSpec, num_workers: int) -> JobSpec:
    images = spec.global_batch_size
    if num_workers < 1 or images % num_workers:
        possible = ", ".join(str(n) for n in range(1, min(images, _MAX_NAMED) + 1) if images % n == 0)
        text = f"{num_workers} workers cannot share {images} images a step evenly; possible are {possible}"
        raise InvalidRequest([FieldProblem("/num_workers", "batch_indivisible", text)])
    size = {"num_workers": num_workers, "batch_size_per_worker": images // num_workers}
    try:
        return JobSpec.model_validate(spec.model_dump() | size)
    except ValidationError as error:
        problems = [FieldProblem("/num_workers", problem["type"], problem["msg"]) for problem in error.errors()]
        raise InvalidRequest(problems) from error


def set_priority(connection: Connection, job: Job, priority: int, now: datetime) -> Job:
    """Change which of an owner's waiting jobs goes first; the same priority again changes nothing.

    Of writers that saw the same job one wins. Raises: Conflict, also for a terminal job; InvalidRequest.
    """
    if job.state.terminal:
        raise Conflict(f"{job.id} is {job.state}; its priority no longer matters")
    try:
        spec = JobSpec.model_validate(job.spec.model_dump() | {"priority": priority})
    except ValidationError as error:
        problems = [FieldProblem("/priority", problem["type"], problem["msg"]) for problem in error.errors()]
        raise InvalidRequest(problems) from error
    changes = {"spec": spec.model_dump_json(), "priority": priority, "updated_at": now}
    if priority != get_job(connection, job.id, now, lock=True).spec.priority:
        compare_and_set(connection, job, changes, now)
        body = json.dumps({"from": job.spec.priority, "to": priority})
        append_events(connection, job.id, [NewEvent(now, PRIORITY_CHANGED, body, job.attempt or None)])
    return get_job(connection, job.id, now)


def changed_positions(connection: Connection, positions: Mapping[str, int | None]) -> dict[str, int | None]:
    """Those of ``positions`` that differ from what is stored of jobs that are queued."""
    queued = select(jobs.c.id, jobs.c.queue_position).where(jobs.c.state == JobState.QUEUED)
    stored = {row.id: row.queue_position for row in connection.execute(queued)}
    return {job: place for job, place in positions.items() if job in stored and stored[job] != place}


def set_positions(connection: Connection, positions: Mapping[str, int | None], lease: Lease | None) -> None:
    """Store places in the queue, of jobs that are still queued, in the order in which jobs are locked."""
    require_lease(connection, lease)
    chosen = (jobs.c.id == bindparam("of_job"), jobs.c.state == JobState.QUEUED)
    rows = [{"of_job": job_id, "place": positions[job_id]} for job_id in sorted(positions)]
    connection.execute(update(jobs).where(*chosen).values(queue_position=bindparam("place")), rows)
