"""What routes need of the rest of the service, handed to the app once."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from anyio.to_thread import run_sync
from fastapi import Depends, Request

from service.api.feed import Feed
from service.api.metrics import Metrics
from service.errors import FieldProblem
from service.jobs import Job, JobPlan, JobSpec, Principal, Webhook, WebhookDelivery, WebhookOrder
from service.store import JobStore


class Hooks(Protocol):
    """What is asked about webhooks."""

    async def problems(self, order: WebhookOrder, asker: Principal) -> Sequence[FieldProblem]:
        """Why ``asker`` may not have such a webhook; empty where they may."""

    async def trial(self, hook: Webhook) -> WebhookDelivery:
        """What comes of a test message, sent now. Raises TooManyRequests."""


@dataclass(frozen=True)
class Parts:
    """The parts behind the API."""

    store: JobStore
    check_placement: Callable[[JobSpec], Sequence[FieldProblem]]
    """Why the cluster could never hold such a job; empty where it could."""
    storage: Path
    """Folder that all checkpoints lie below."""
    plan: Callable[[JobSpec], JobPlan]
    """What would become of such a job."""
    readiness: Callable[[], dict[str, str]]
    """The state of each part; "ok" for what works."""
    hooks: Hooks
    """Judges and tries webhooks."""
    feed: Feed
    """What happens to the jobs that someone follows."""
    metrics: Metrics
    """What the service measures of itself."""
    stopping: threading.Event
    """Set when the service is about to end: streams shall leave."""


def parts_of(request: Request) -> Parts:
    """The parts of the app that answers this request."""
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


# Dependencies that wait for nothing are coroutines all the same: others go through a worker thread, each time.


async def _parts_of(request: Request) -> Parts:
    return parts_of(request)


async def _store_of(request: Request) -> JobStore:
    return parts_of(request).store


async def _job_of(job_id: str, request: Request) -> Job:
    return await job_in_path(request, job_id)


async def job_in_path(request: Request, job_id: str) -> Job:
    """The job that the request's path names, as it stood when the request first asked. Raises: NotFound."""
    job = getattr(request.state, "job_in_path", None)
    if not isinstance(job, Job):
        job = request.state.job_in_path = await run_sync(parts_of(request).store.get, job_id)
    return job


PartsOf = Annotated[Parts, Depends(_parts_of)]
Store = Annotated[JobStore, Depends(_store_of)]
ExistingJob = Annotated[Job, Depends(_job_of)]
"""The job named in the path; there is a 404 where there is none."""
