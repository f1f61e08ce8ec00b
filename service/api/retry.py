"""A job that is over, taken up again: as a new job, so that what happened to the old one stays true."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from service.api.acceptance import REPLAYED, IdempotencyKey, accept
from service.api.auth import Asker, require_json, require_role
from service.api.parts import ExistingJob, Parts, PartsOf
from service.api.problems import answers
from service.api.steering import Verb, target
from service.confinement import path_problems
from service.errors import Conflict, FieldProblem, InvalidRequest
from service.jobs import Job, JobState, Role
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[require_role(Role.SUBMITTER)])


def _one_complaint(value: Any, build: ValidatorFunctionWrapHandler) -> Any:
    try:
        return build(value)
    except ValidationError:
        raise PydanticCustomError("from_checkpoint", "give true, false, or the step of a checkpoint") from None


class RetryWish(BaseModel):
    """From where: the newest checkpoint (true), the beginning (false), or the checkpoint of a step.

    Left out: from the newest checkpoint, if there is one, of a job that did not succeed; else from the beginning.
    """

    model_config = ConfigDict(extra="forbid")

    from_checkpoint: Annotated[StrictBool | Annotated[StrictInt, Field(ge=0)] | None, WrapValidator(_one_complaint)] = (
        None
    )


@router.post(
    "/{job_id}:retry",
    status_code=201,
    summary="Take a job up again",
    dependencies=[Depends(require_json)],
    responses=REPLAYED | answers(400, 401, 404, 409, 413, 415, 422, 429, 503),
)
def retry_job(
    job: ExistingJob,
    asker: Asker,
    parts: PartsOf,
    request: Request,
    response: Response,
    wish: RetryWish | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Make a new job of the caller's with the spec of one that is over, which `retry_of` names."""
    target(Verb.RETRY, job)
    _require_hope(job, parts.store)
    wanted = None if wish is None else wish.from_checkpoint
    return accept(
        job.spec,
        idempotency_key,
        asker,
        parts,
        request,
        response,
        retry_of=job.id,
        start_checkpoint=lambda: _start_checkpoint(job, wanted, parts),
    )


def _require_hope(job: Job, store: JobStore) -> None:
    states = store.states_of(job.spec.after)
    lost = [name for name in job.spec.after if states.get(name) in (None, JobState.FAILED, JobState.CANCELLED)]
    if lost:
        raise Conflict(
            f"{job.id} was to start after {', '.join(lost)}, which did not succeed, so a retry could not start; "
            "submit its spec again with another `after`"
        )


def _start_checkpoint(job: Job, wanted: bool | int | None, parts: Parts) -> str | None:
    """The file to begin from, None for the beginning.

    Raises: InvalidRequest where the wanted one is not there, or where an attempt has told of a file that lies outside
        of what the service keeps.
    """
    required = wanted is not None
    if wanted is None:
        wanted = job.state is not JobState.SUCCEEDED
    if wanted is False:
        return None
    kept = {saved.step: saved.path for saved in parts.store.checkpoints(job.id) if Path(saved.path).is_file()}
    newest = kept[max(kept)] if kept else job.start_checkpoint
    path = newest if wanted is True else kept.get(wanted)
    if path is None and required:
        there = f"there are those of steps {', '.join(map(str, kept))}" if kept else "there are none"
        text = f"{job.id} has no such checkpoint any more; {there}, and false begins from the beginning"
        raise InvalidRequest([FieldProblem("/from_checkpoint", "checkpoint_missing", text)])
    if path and (problems := path_problems(path, [parts.storage], "/from_checkpoint", "SYNCBN_STORAGE")):
        raise InvalidRequest(problems)
    return path
