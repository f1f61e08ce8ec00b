"""What may be done with a job on its way: cancel, pause, resume, save a checkpoint, change its priority."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import require_json, require_role
from service.api.parts import ExistingJob, Parts, PartsOf, Store
from service.api.problems import Answers, answers
from service.api.steering import DONE, TRIES, Verb, steer
from service.api.versions import IfMatch, require_match, tell_version
from service.errors import Conflict, InvalidRequest
from service.jobs import Job, JobState, Reason, Role
from service.store import JobStore

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[require_role(Role.SUBMITTER)])


class ResumeWish(BaseModel):
    """With how many workers to go on; left out, with as many as before."""

    model_config = ConfigDict(extra="forbid")

    num_workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    """They share the images of a step among them as the former workers did, so their number must divide it."""


class JobChange(BaseModel):
    """What may be changed of a job."""

    model_config = ConfigDict(extra="forbid")

    priority: Annotated[int, Field(ge=-100, le=100)]


def _accepted(description: str, *statuses: int) -> Answers:
    return {202: {"model": Job, "description": description}} | answers(400, 401, 404, 409, 503, *statuses)


@router.post("/{job_id}:cancel", summary="Cancel a job", responses=_accepted("Its workers are leaving", 422))
def cancel_job(
    job_id: str,
    store: Store,
    response: Response,
    checkpoint: Annotated[
        bool, Query(description="Let it save a checkpoint first, within its `stop_grace_s`.")
    ] = False,
) -> Job:
    """End the job. One that waits or is paused is cancelled at once, one that runs when its workers have gone.

    A job that is saving to be cancelled leaves without, at once, when it is cancelled again without `checkpoint`.
    """
    return _answer(response, *cancel(store, job_id, checkpoint=checkpoint))


def cancel(store: JobStore, job_id: str, *, checkpoint: bool) -> tuple[Job, bool]:
    """Set the job on its way to be cancelled; whether it was not so before. Raises: NotFound, Conflict."""

    def act(job: Job, to: JobState) -> Job:
        if job.state is to:
            return store.force_cancel(job)
        return store.transition(job, to, reason=Reason.CANCELLED_BY_USER, stop_saves=checkpoint)

    return steer(store, job_id, Verb.CANCEL, act, again=lambda job: job.stop_saves and not checkpoint)


@router.post("/{job_id}:pause", summary="Pause a job", responses=_accepted("Its workers are saving and leaving"))
def pause_job(job_id: str, store: Store, response: Response) -> Job:
    """Let the job save a checkpoint and give back its resources until it is resumed. One that waits pauses at once."""

    def pause(job: Job, to: JobState) -> Job:
        return store.transition(job, to, reason=Reason.PAUSED_BY_USER)

    return _answer(response, *steer(store, job_id, Verb.PAUSE, pause))


@router.post(
    "/{job_id}:resume",
    summary="Resume a job",
    dependencies=[Depends(require_json)],
    responses=_accepted("It waits in the queue", 413, 415, 422),
)
def resume_job(
    job: ExistingJob, store: Store, parts: PartsOf, response: Response, wish: ResumeWish | None = None
) -> Job:
    """Put a paused job back into its old place in the queue; it goes on from its checkpoint."""
    num_workers = None if wish is None else wish.num_workers
    if num_workers not in (None, job.spec.num_workers):
        _require_resizable(job, num_workers, parts)
    return _answer(response, *steer(store, job.id, Verb.RESUME, lambda paused, _: store.resume(paused, num_workers)))


@router.post("/{job_id}:checkpoint", summary="Save a checkpoint", responses=_accepted("Its workers are asked"))
def save_checkpoint(job_id: str, store: Store, response: Response) -> Job:
    """Ask a job that runs for a checkpoint; an event `checkpoint` tells when it is on disk."""
    return _answer(response, *steer(store, job_id, Verb.CHECKPOINT, lambda job, _: store.request_checkpoint(job.id)))


@router.patch(
    "/{job_id}",
    summary="Change a job",
    dependencies=[Depends(require_json)],
    responses=answers(400, 401, 404, 409, 412, 413, 415, 422, 503),
)
def change_job(job_id: str, change: JobChange, store: Store, response: Response, if_match: IfMatch = None) -> Job:
    """Give a job another priority among its owner's. Its version counts this, as it counts changes of state."""
    for _ in range(TRIES):
        job = store.get(job_id)
        require_match(job, if_match)
        if job.state.terminal:
            raise Conflict(f"{job.id} is already {job.state}; there is nothing left to change")
        try:
            return tell_version(response, store.set_priority(job, change.priority))
        except Conflict:
            continue
    raise Conflict(f"{job_id} kept changing while its priority was to be changed; try again")


def _answer(response: Response, job: Job, changed: bool) -> Job:
    """202 while there is more to come of what was asked, 200 where it is done or was asked before."""
    at_once = job.state in (JobState.PAUSED, JobState.CANCELLED)
    response.status_code = 202 if changed and not at_once else 200
    return tell_version(response, job)


def _require_resizable(job: Job, num_workers: int, parts: Parts) -> None:
    if job.state in DONE[Verb.RESUME]:
        raise Conflict(
            f"{job.id} is {job.state} with {job.spec.num_workers} workers; :pause it, then resume it with {num_workers}"
        )
    resized = job.spec.model_copy(update={"num_workers": num_workers})
    problems = [problem for problem in parts.check_placement(resized) if problem.pointer == "/num_workers"]
    if problems:
        raise InvalidRequest(problems)
