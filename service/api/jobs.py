"""Jobs over HTTP: submit, look, list, cancel, report."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response

from service.api.auth import Asker, require_json, require_role, visible_owner
from service.api.parts import ExistingJob, PartsOf, Store
from service.api.problems import Answers, answers
from service.api.submission import Submission
from service.errors import Conflict, InvalidRequest
from service.jobs import Job, JobPage, JobReport, JobState, Reason, Role
from service.reports import report_job
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_TRIES = 20

_REPLAYED: Answers = {200: {"model": Job, "description": "The job made earlier under this key"}}
_ACCEPTED: Answers = {202: {"model": Job, "description": "Its workers are being stopped"}}

Key = Annotated[
    str | None,
    Header(description="A word of the caller's choice: the same word with the same spec never makes a second job."),
]


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    dependencies=[Depends(require_json), require_role(Role.SUBMITTER)],
    responses=_REPLAYED | answers(400, 401, 413, 415, 422, 503),
)
def submit_job(
    spec: Submission, asker: Asker, store: Store, parts: PartsOf, response: Response, idempotency_key: Key = None
) -> Job:
    """Accept a training job; it starts when the cluster has room. Every wrong field is named at once."""
    # A replay is answered as the first time was, even if the cluster has shrunk meanwhile.
    known = None if idempotency_key is None else store.recall(spec, idempotency_key, owner=asker.name)
    if known is None and (problems := parts.check_placement(spec)):
        raise InvalidRequest(problems)
    job, created = (known, False) if known is not None else store.create(spec, idempotency_key, owner=asker.name)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not created:
        response.status_code = 200
        response.headers["Idempotency-Replayed"] = "true"
    return job


@router.get("", summary="List jobs", responses=answers(400, 401, 422, 503))
def list_jobs(
    asker: Asker,
    store: Store,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
    state: Annotated[list[JobState] | None, Query(description="Only these states; may be repeated.")] = None,
    name: Annotated[str | None, Query(description="Only jobs of exactly this name.")] = None,
) -> JobPage:
    """Jobs, newest first; everyone's for an admin, else the own ones."""
    return store.list_jobs(limit, cursor, states=state, name=name, owner=visible_owner(asker))


@router.get("/{job_id}", summary="Show a job", responses=answers(400, 401, 404, 503))
def show_job(job: ExistingJob) -> Job:
    """The job as it stands, with how fresh that knowledge is."""
    return job


@router.post(
    "/{job_id}:cancel",
    summary="Cancel a job",
    dependencies=[require_role(Role.SUBMITTER)],
    responses=_ACCEPTED | answers(400, 401, 404, 409, 503),
)
def cancel_job(job_id: str, store: Store, response: Response) -> Job:
    """End the job. One that waits is cancelled at once, one that runs when its workers have gone."""
    job, accepted = _cancel(store, job_id)
    response.status_code = 202 if accepted else 200
    return job


def _cancel(store: JobStore, job_id: str) -> tuple[Job, bool]:
    """The job, and whether it is now on its way to be cancelled. Another writer in between is no reason to fail."""
    for _ in range(_TRIES):
        job = store.get(job_id)
        if job.state in (JobState.CANCELLING, JobState.CANCELLED):
            return job, False
        if job.state.terminal:
            raise Conflict(f"{job.id} has already {job.state}; there is nothing left to cancel")
        to = JobState.CANCELLING if job.state.active else JobState.CANCELLED
        try:
            return store.transition(job, to, reason=Reason.CANCELLED_BY_USER), to is JobState.CANCELLING
        except Conflict:
            continue
    raise Conflict(f"{job_id} kept changing while it was to be cancelled; try again")


@router.get("/{job_id}/report", summary="Report on a job", responses=answers(400, 401, 404, 503))
def report(job: ExistingJob, store: Store) -> JobReport:
    """Whether the job converges, and whether its running statistics can be trusted."""
    losses = store.metric(job.id, "train/loss", max_points=None)
    start = store.start_of(job.id)
    return report_job(
        job,
        job.attempt,
        losses,
        store.evaluations(job.id),
        store.drift(job.id),
        num_classes=start.num_classes if start else None,
    )
