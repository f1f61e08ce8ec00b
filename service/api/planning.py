"""Before a job is submitted: whether its spec is right, and what would become of it."""

from fastapi import APIRouter, Depends

from service.api.auth import require_json, require_role
from service.api.parts import PartsOf
from service.api.problems import answers
from service.api.recording import changes_nothing
from service.api.submission import Submission
from service.errors import InvalidRequest
from service.jobs import JobSpec, Outlook, PlannedJob, Role

router = APIRouter(
    prefix="/v1",
    tags=["jobs"],
    dependencies=[Depends(require_json), Depends(changes_nothing), require_role(Role.SUBMITTER)],
)


@router.post("/jobs:validate", summary="Check a spec", responses=answers(400, 401, 413, 415, 422, 503))
def validate_spec(spec: Submission, parts: PartsOf) -> JobSpec:
    """The spec with all its defaults, if it could be submitted now; else every wrong field, as submitting would."""
    if problems := parts.check_placement(spec):
        raise InvalidRequest(problems)
    return spec


@router.post("/jobs:plan", summary="Plan a job", responses=answers(400, 401, 413, 415, 422, 503))
def plan_job(spec: Submission, parts: PartsOf) -> PlannedJob:
    """Batches, layers, exchanges and steps of a job, with warnings, reckoned in some seconds without training."""
    plan = parts.plan(spec)
    placement = tuple(Outlook(**vars(problem)) for problem in parts.check_placement(spec))
    return PlannedJob(plan=plan, feasible=not placement, placement=placement)
