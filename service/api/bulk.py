"""One request for many jobs: each has an answer of its own, and none keeps the others from theirs."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from service.api.auth import Asker, require_json, require_role, visible_owner
from service.api.lifecycle import cancel
from service.api.parts import Store
from service.api.problems import answers
from service.api.recording import say_what_for
from service.errors import NotFound, ServiceError
from service.jobs import Job, Role, View
from service.store import JobStore

router = APIRouter(prefix="/v1", tags=["jobs"], dependencies=[require_role(Role.SUBMITTER)])


class Chosen(BaseModel):
    """The jobs that are meant."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=200)]
    checkpoint: bool = False
    """Let those that run save a checkpoint first, within their `stop_grace_s`."""


class Outcome(View):
    """What came of one job: the job as it now is, or why nothing could be done."""

    id: str
    status: int
    """As if it had been asked alone."""
    job: Job | None = None
    code: str | None = None
    detail: str | None = None


class Outcomes(View):
    """One for each id, once, in the order of their first naming."""

    items: tuple[Outcome, ...]


@router.post(
    "/jobs:cancel",
    summary="Cancel many jobs",
    dependencies=[Depends(require_json)],
    responses=answers(400, 401, 413, 415, 422, 503),
)
def cancel_jobs(chosen: Chosen, asker: Asker, store: Store, request: Request) -> Outcomes:
    """Cancel up to 200 jobs; the answer tells of each what came of it."""
    say_what_for(request, " ".join(chosen.ids))
    owner = visible_owner(asker)
    ids = dict.fromkeys(chosen.ids)
    return Outcomes(items=tuple(_cancel(store, job_id, owner, chosen.checkpoint) for job_id in ids))


def _cancel(store: JobStore, job_id: str, owner: str | None, checkpoint: bool) -> Outcome:
    try:
        if owner is not None and store.get(job_id).owner != owner:
            raise NotFound(f"there is no job {job_id}")
        job, changed = cancel(store, job_id, checkpoint=checkpoint)
    except ServiceError as error:
        return Outcome(id=job_id, status=error.status, code=error.code, detail=str(error))
    return Outcome(id=job_id, status=202 if changed and not job.state.terminal else 200, job=job)
