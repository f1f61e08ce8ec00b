"""Jobs over HTTP: submit, look, list."""

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AwareDatetime

from service.api.acceptance import REPLAYED, IdempotencyKey, accept
from service.api.auth import Asker, require_json, require_role, visible_owner
from service.api.parts import ExistingJob, PartsOf, Store
from service.api.problems import answers
from service.api.submission import Submission
from service.api.versions import tell_version
from service.jobs import Job, JobPage, JobState, Role

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    dependencies=[Depends(require_json), require_role(Role.SUBMITTER)],
    responses=REPLAYED | answers(400, 401, 413, 415, 422, 503),
)
async def submit_job(
    spec: Submission,
    asker: Asker,
    parts: PartsOf,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Accept a training job; it starts when the cluster has room. Every wrong field is named at once."""
    return await run_sync(accept, spec, idempotency_key, asker, parts, request, response)


@router.get("", summary="List jobs", responses=answers(400, 401, 422, 503))
def list_jobs(
    asker: Asker,
    store: Store,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=500, description="`next_cursor` of the page before.")] = None,
    state: Annotated[list[JobState] | None, Query(description="Only these states; may be repeated.")] = None,
    name: Annotated[str | None, Query(description="Only jobs of exactly this name.")] = None,
    owner: Annotated[str | None, Query(description="Only this principal's jobs.")] = None,
    created_after: Annotated[AwareDatetime | None, Query(description="Only jobs of this time or later.")] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="Only jobs of before this time.")] = None,
) -> JobPage:
    """Jobs, newest first; everyone's for an admin, else the own ones."""
    visible = visible_owner(asker)
    if visible is not None and owner not in (None, visible):
        return JobPage(items=())
    return store.list_jobs(
        limit,
        cursor,
        states=state,
        name=name,
        owner=visible or owner,
        created_after=created_after,
        created_before=created_before,
    )


@router.get("/{job_id}", summary="Show a job", responses=answers(400, 401, 404, 503))
async def show_job(job: ExistingJob, response: Response) -> Job:
    """The job as it stands, with how fresh that knowledge is; its `ETag` is its version."""
    return tell_version(response, job)
