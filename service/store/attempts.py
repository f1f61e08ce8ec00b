"""Attempts: their secret, and how far each has reported. Of a token only its SHA-256 is kept."""

import hashlib
import hmac
import secrets
from datetime import datetime

from sqlalchemy import Connection, func, insert, select

from service.errors import NotFound, Unauthorized
from service.jobs import Attempt, AttemptEnded, Job, JobState, Phase, job_of_attempt
from service.store.jobs import change_state
from service.store.leases import Lease
from service.store.schema import attempts, ranks


def start_attempt(connection: Connection, job: Job, now: datetime, lease: Lease | None = None) -> tuple[Job, str]:
    """The job in its next attempt, and the token with which that attempt reports: 256 random bits in hex.

    Of writers that saw the same job one wins, as `change_state` says. Raises: Conflict, LeaseLost.
    """
    token = secrets.token_hex(32)
    started = change_state(
        connection,
        job,
        JobState.STARTING,
        phase=Phase.LAUNCHING,
        reason=None,
        detail="",
        now=now,
        new_attempt=True,
        lease=lease,
    )
    row = {"job_id": job.id, "number": started.attempt, "token_sha256": _sha256(token), "created_at": now}
    connection.execute(insert(attempts).values(row))
    return started, token


def authorize(connection: Connection, attempt_id: str, token: str) -> tuple[str, int]:
    """Job and number of the attempt that the token belongs to.

    Raises: Unauthorized alike for a wrong token and for an attempt that does not exist.
    """
    refusal = Unauthorized("this needs the ingest token of the attempt, as a bearer token")
    try:
        job_id, number = job_of_attempt(attempt_id)
    except ValueError as error:
        raise refusal from error
    chosen = (attempts.c.job_id == job_id, attempts.c.number == number)
    stored = connection.execute(select(attempts.c.token_sha256).where(*chosen)).scalar()
    if not hmac.compare_digest(stored or "", _sha256(token)):
        raise refusal
    return job_id, number


def get_attempt(connection: Connection, job_id: str, number: int) -> Attempt:
    """The attempt as far as it has reported. Raises NotFound."""
    chosen = (attempts.c.job_id == job_id, attempts.c.number == number)
    row = connection.execute(select(attempts).where(*chosen)).one_or_none()
    if row is None:
        raise NotFound(f"there is no attempt {number} of job {job_id}")
    of_attempt = (ranks.c.job_id == job_id, ranks.c.attempt == number)
    last_step = connection.execute(select(func.max(ranks.c.last_step)).where(*of_attempt)).scalar()
    num_started = connection.execute(select(func.count()).where(*of_attempt, ranks.c.started)).scalar_one()
    return Attempt(
        job_id=job_id,
        number=number,
        created_at=row.created_at,
        heartbeat_at=row.heartbeat_at,
        num_ranks_started=num_started,
        last_step=last_step or 0,
        ended=None if row.ended is None else AttemptEnded.model_validate_json(row.ended),
    )


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
