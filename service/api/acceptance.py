"""How a new job is accepted, submitted or retried: once for each key, if cluster and quota allow it."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Header, Request, Response

from service.api.parts import Parts
from service.api.problems import Answers
from service.api.recording import entry_of, is_on_record
from service.api.versions import tell_version
from service.errors import FieldProblem, InvalidRequest
from service.jobs import Job, JobSpec, Principal

REPLAYED: Answers = {200: {"model": Job, "description": "The job made earlier under this key"}}

IdempotencyKey = Annotated[
    str | None,
    Header(description="A word of the caller's choice: the same word with the same spec never makes a second job."),
]


def accept(
    spec: JobSpec,
    key: str | None,
    asker: Principal,
    parts: Parts,
    request: Request,
    response: Response,
    *,
    retry_of: str | None = None,
    start_checkpoint: Callable[[], str | None] = lambda: None,
) -> Job:
    """A new job of ``asker``, or the one that the same key and spec made before, with the headers that say so.

    Raises: InvalidRequest for what the cluster or the owner's quota could never run, and for a key that was used
    otherwise; TooManyRequests where the quota's number of jobs wait already.
    """
    store = parts.store
    # A replay is answered as the first time was, even if the cluster has shrunk meanwhile.
    job = None if key is None else store.recall(spec, key, owner=asker.name)
    created = False
    if job is None:
        _require_possible(spec, asker, parts)
        job, created = store.create(
            spec,
            key,
            owner=asker.name,
            retry_of=retry_of,
            start_checkpoint=start_checkpoint(),
            record=lambda job: entry_of(request.scope, 201, _path(job)),
        )
    if created:
        is_on_record(request)
    if job.retry_of != retry_of:
        text = f"was used before for another request, which became {job.id}; choose a fresh key"
        raise InvalidRequest([FieldProblem("/Idempotency-Key", "idempotency_key_reused", text)])
    response.headers["Location"] = _path(job)
    if not created:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return tell_version(response, job)


def _path(job: Job) -> str:
    return f"/v1/jobs/{job.id}"


def _require_possible(spec: JobSpec, asker: Principal, parts: Parts) -> None:
    problems = list(parts.check_placement(spec))
    most = asker.quota.max_running_workers
    if most is not None and spec.num_workers > most:
        text = f"{asker.name} may run {most} workers at once; lower num_workers, or ask an admin for a larger quota"
        problems.append(FieldProblem("/num_workers", "exceeds_quota", text))
    if problems:
        raise InvalidRequest(problems)
