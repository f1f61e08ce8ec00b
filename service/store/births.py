"""How jobs come to be: once for each idempotency key, and only after jobs that exist."""

import hashlib
from datetime import datetime

from sqlalchemy import Connection, insert, select

from service.errors import FieldProblem, InvalidRequest, TooManyRequests
from service.jobs import Job, JobSpec, JobState, new_job_id
from service.store.events import append_events
from service.store.jobs import count_jobs, get_job, state_changed
from service.store.locks import lock_name
from service.store.principals import hold_quota
from service.store.schema import idempotency_keys, jobs

_MAX_KEY_LENGTH = 255


def create_job(
    connection: Connection,
    spec: JobSpec,
    idempotency_key: str | None,
    now: datetime,
    *,
    owner: str,
    retry_of: str | None,
    start_checkpoint: str | None,
) -> tuple[Job, bool]:
    """A queued job with its first event, or the job that the owner made under the same key before.

    Writers with the same key of the same owner wait for each other before they look, so that one of them makes the
    job. Raises: InvalidRequest as `recall_job` does, or where the job shall come after one that the owner has not;
    TooManyRequests where as many of the owner's jobs wait as may.
    """
    if idempotency_key is not None:
        lock_name(connection, "idempotency_key", owner, idempotency_key)
        earlier = recall_job(connection, spec, idempotency_key, owner, now)
        if earlier is not None:
            return earlier, False
    _check_after(connection, spec, owner)
    _require_room(connection, owner)
    job_id = _insert_job(connection, spec, owner, retry_of, start_checkpoint, now)
    if idempotency_key is not None:
        record = {"owner": owner, "key": idempotency_key, "job_id": job_id, "spec_sha256": _fingerprint(spec)}
        connection.execute(insert(idempotency_keys).values(record | {"created_at": now}))
    return get_job(connection, job_id, now), True


def recall_job(connection: Connection, spec: JobSpec, key: str, owner: str, now: datetime) -> Job | None:
    """The job that the owner made under this key, if any. Raises InvalidRequest where it was made of another spec."""
    if not 1 <= len(key) <= _MAX_KEY_LENGTH or not key.isprintable() or not key.isascii():
        text = f"must be 1 to {_MAX_KEY_LENGTH} printable ASCII letters"
        raise InvalidRequest([FieldProblem("/Idempotency-Key", "idempotency_key_invalid", text)])
    chosen = (idempotency_keys.c.owner == owner, idempotency_keys.c.key == key)
    row = connection.execute(select(idempotency_keys).where(*chosen)).one_or_none()
    if row is None:
        return None
    if row.spec_sha256 != _fingerprint(spec):
        text = f"was used before for another spec, which became {row.job_id}; choose a fresh key"
        raise InvalidRequest([FieldProblem("/Idempotency-Key", "idempotency_key_reused", text)])
    return get_job(connection, row.job_id, now)


def _fingerprint(spec: JobSpec) -> str:
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()


def _check_after(connection: Connection, spec: JobSpec, owner: str) -> None:
    if not spec.after:
        return
    own = select(jobs.c.id).where(jobs.c.id.in_(spec.after), jobs.c.owner == owner)
    known = set(connection.execute(own).scalars())
    unknown = [job_id for job_id in spec.after if job_id not in known]
    if unknown:
        text = f"{owner} has no job {', '.join(unknown)}; name jobs of the same owner that exist"
        raise InvalidRequest([FieldProblem("/after", "job_unknown", text)])


def _require_room(connection: Connection, owner: str) -> None:
    """Submissions of one owner wait for each other before they count, so that together they keep to the quota."""
    limit = hold_quota(connection, owner).max_queued_jobs
    if limit is not None and (waiting := count_jobs(connection, owner, {JobState.QUEUED})) >= limit:
        raise TooManyRequests(
            f"{waiting} jobs of {owner} wait, and {limit} may; "
            "come back when some have started, :cancel some, or ask an admin for a larger quota"
        )


def _insert_job(
    connection: Connection,
    spec: JobSpec,
    owner: str,
    retry_of: str | None,
    start_checkpoint: str | None,
    now: datetime,
) -> str:
    job_id = new_job_id()
    connection.execute(
        insert(jobs).values(
            id=job_id,
            owner=owner,
            name=spec.name,
            spec=spec.model_dump_json(),
            priority=spec.priority,
            state=JobState.QUEUED,
            state_since=now,
            detail="",
            stop_saves=False,
            attempt=0,
            retry_of=retry_of,
            start_checkpoint=start_checkpoint,
            checkpoint_requests=0,
            version=1,
            num_events=0,
            num_logs=0,
            created_at=now,
            updated_at=now,
        )
    )
    append_events(connection, job_id, [state_changed(now, None, JobState.QUEUED, 0, None, None, "")])
    return job_id
