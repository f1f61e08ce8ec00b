"""Attempts: their secret, and how far each has reported. Of a token only its SHA-256 is kept."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, case, func, insert, select, tuple_

from service.errors import NotFound, Unauthorized
from service.jobs import RUNNER, Attempt, AttemptEnded, Job, JobState, Phase, job_of_attempt
from service.store.jobs import change_state
from service.store.leases import Lease
from service.store.logs import NewLine, append_lines
from service.store.schema import attempts, events, ranks

_PAIRS_AT_ONCE = 500
"""A statement takes a bounded number of values on every database."""


_MAX_NUMBER = 2**31
"""What every database can compare with; whoever names a greater one has not got it from here."""


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
    if number >= _MAX_NUMBER:
        raise refusal
    chosen = (attempts.c.job_id == job_id, attempts.c.number == number)
    stored = connection.execute(select(attempts.c.token_sha256).where(*chosen)).scalar()
    if not hmac.compare_digest(stored or "", _sha256(token)):
        raise refusal
    return job_id, number


def get_attempt(connection: Connection, job_id: str, number: int) -> Attempt:
    """The attempt as far as it has reported. Raises NotFound."""
    found = get_attempts(connection, [(job_id, number)])
    if job_id not in found:
        raise NotFound(f"there is no attempt {number} of job {job_id}")
    return found[job_id]


def get_attempts(connection: Connection, wanted: Sequence[tuple[str, int]]) -> dict[str, Attempt]:
    """By job, the attempt of that number as far as it has reported; one that does not exist is absent."""
    found: dict[str, Attempt] = {}
    for start in range(0, len(wanted), _PAIRS_AT_ONCE):
        pairs = wanted[start : start + _PAIRS_AT_ONCE]
        reached = _reached(connection, pairs)
        chosen = select(attempts).where(tuple_(attempts.c.job_id, attempts.c.number).in_(pairs))
        for row in connection.execute(chosen):
            num_started, last_step = reached.get(row.job_id, (0, 0))
            found[row.job_id] = Attempt(
                job_id=row.job_id,
                number=row.number,
                created_at=row.created_at,
                heartbeat_at=row.heartbeat_at,
                num_ranks_started=num_started,
                last_step=last_step,
                ended=None if row.ended is None else AttemptEnded.model_validate_json(row.ended),
            )
    return found


def told_step(connection: Connection, job_id: str) -> int | None:
    """How far every rank has told its steps, in the newest attempt in which all began; None before that.

    An attempt of which only some ranks have told their beginning has not told what the others shall tell before it.
    """
    begun = (ranks.c.job_id == job_id, ranks.c.rank >= 0, ranks.c.started)
    reached = select(ranks.c.attempt, func.count(), func.min(ranks.c.last_step)).where(*begun).group_by(ranks.c.attempt)
    for number, num_started, last_step in connection.execute(reached.order_by(ranks.c.attempt.desc())).all():
        if num_started >= _world_size(connection, job_id, number):
            return int(last_step)
    return None


def _world_size(connection: Connection, job_id: str, number: int) -> int:
    """How many ranks the attempt has, of which at least one has told that it began."""
    chosen = (events.c.job_id == job_id, events.c.type == "rank_started", events.c.attempt == number)
    body = connection.execute(select(events.c.body).where(*chosen).order_by(events.c.seq).limit(1)).scalar_one()
    return int(json.loads(body)["world_size"])


def keep_output(connection: Connection, job: Job, output: str, now: datetime) -> None:
    """Add the last lines that the job's attempt wrote, and never sent, to the job's log."""
    lines = [NewLine(now, job.attempt, RUNNER, "info", line) for line in output.splitlines()]
    append_lines(connection, job.id, lines)


def _reached(connection: Connection, pairs: Sequence[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """By job: how many ranks have started, and the last step of any."""
    num_started = func.sum(case((ranks.c.started, 1), else_=0))
    query = (
        select(ranks.c.job_id, num_started, func.max(ranks.c.last_step))
        .where(tuple_(ranks.c.job_id, ranks.c.attempt).in_(pairs))
        .group_by(ranks.c.job_id)
    )
    return {job_id: (started, last_step) for job_id, started, last_step in connection.execute(query)}


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
