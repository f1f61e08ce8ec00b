"""Identifiers that sort by time of birth and tell what they name: ``job_01JQ...``."""

import secrets
import time

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_job_id() -> str:
    """A fresh job identifier: 48 bits of milliseconds, then 80 random bits, as in ULID."""
    return "job_" + _ulid()


def new_key_id() -> str:
    """A fresh identifier of an API key, of the same kind. It is no secret."""
    return "key_" + _ulid()


def new_hook_id() -> str:
    """A fresh identifier of a webhook, of the same kind."""
    return "hook_" + _ulid()


def attempt_id(job_id: str, number: int) -> str:
    """The name of attempt ``number`` (from 1) of a job; also the submission id that Ray knows it by."""
    return f"{job_id}-{number}"


def job_of_attempt(attempt: str) -> tuple[str, int]:
    """Inverse of `attempt_id`. Raises ValueError where ``attempt`` is not such a name."""
    job_id, dash, number = attempt.rpartition("-")
    if not dash or not number.isdigit() or not job_id.startswith("job_"):
        raise ValueError(f"not an attempt id: {attempt!r}; expected <job id>-<number>")
    return job_id, int(number)


def _ulid() -> str:
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
