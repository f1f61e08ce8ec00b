"""What routes need of the rest of the service, handed to the app once."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

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


def _store_of(parts: Annotated[Parts, Depends(parts_of)]) -> JobStore:
    return parts.store


def _job_of(job_id: str, store: Annotated[JobStore, Depends(_store_of)]) -> Job:
    return store.get(job_id)


PartsOf = Annotated[Parts, Depends(parts_of)]
Store = Annotated[JobStore, Depends(_store_of)]
ExistingJob = Annotated[Job, Depends(_job_of)]
"""The job named in the path; there is a 404 where there is none."""
