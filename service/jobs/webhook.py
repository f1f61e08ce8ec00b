"""Webhooks: where the service tells of jobs' events by itself, and the messages that it sends there."""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field, HttpUrl

from service.jobs.job import View
from service.jobs.spec_part import SpecPart
from service.jobs.states import JobState

SECRET_NAME = Annotated[
    str,
    Field(
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(@[a-z0-9][a-z0-9._-]*)?$",
        description="The name of a secret that lies with the service, never the secret itself. NAME@PRINCIPAL is that "
        "principal's own; any other can be used by admins alone.",
    ),
]


class Topic(StrEnum):
    """The type of a job's event, or all of them. Changes of state are told to every webhook."""

    EVERYTHING = "*"
    STATE_CHANGED = "state_changed"
    PHASE_CHANGED = "phase_changed"
    CHECKPOINT_REQUESTED = "checkpoint_requested"
    RESIZED = "resized"
    CANCEL_FORCED = "cancel_forced"
    PRIORITY_CHANGED = "priority_changed"
    RANK_STARTED = "rank_started"
    EVALUATION = "evaluation"
    DRIFT = "drift"
    MOMENTUM_REPLAY = "momentum_replay"
    MODE_FAULT = "mode_fault"
    NON_FINITE = "non_finite"
    LIMIT_EXCEEDED = "limit_exceeded"
    CHECKPOINT = "checkpoint"
    RESUME_CERTIFICATE = "resume_certificate"
    STOPPED = "stopped"
    TRAINING_FINISHED = "training_finished"
    ATTEMPT_ENDED = "attempt_ended"


TEST_EVENT = "test"
"""The type of the message that is sent to try a webhook; it is about no job."""


class WebhookState(StrEnum):
    """Whether a webhook is told anything."""

    ACTIVE = "active"
    FAILING = "failing"
    """An event could not be delivered for a day: nothing is sent any more until a test of the webhook succeeds."""


def _check_url(url: HttpUrl) -> HttpUrl:
    if url.username is not None or url.password is not None:
        raise ValueError("a name or password must not stand in the URL; receivers know this service by its signature")
    if url.fragment is not None:
        raise ValueError("a fragment (#...) is never sent; leave it out")
    if len(str(url)) > 2000:
        raise ValueError("at most 2000 letters")
    return url


class WebhookOrder(SpecPart):
    """A webhook to be made: tell of the asker's own jobs, or with ``all``, as an admin may, of everyone's."""

    url: Annotated[HttpUrl, AfterValidator(_check_url)]
    events: Annotated[tuple[Topic, ...], Field(min_length=1, max_length=32)]
    secret: SECRET_NAME
    all: bool = False

    @property
    def topics(self) -> tuple[Topic, ...]:
        """``events``, each once, and changes of state, which are always told."""
        return tuple(dict.fromkeys((Topic.STATE_CHANGED, *self.events)))


class Webhook(View):
    """A webhook as it stands."""

    id: str
    owner: str
    """The principal who made it."""
    url: str
    events: tuple[Topic, ...]
    secret: str
    """The name of the secret that its messages are signed with."""
    all: bool
    state: WebhookState
    created_at: AwareDatetime


class WebhookDelivery(View):
    """One try to deliver a message, and what came of it."""

    time: AwareDatetime
    event: str
    """The event's type; ``test`` for a test."""
    job_id: str | None = None
    seq: int | None = None
    """The event's number within its job."""
    status: int | None = None
    """The HTTP status that was answered, if any was; 2xx is success."""
    error: str | None = None
    """Why the try failed; null of one that succeeded."""
    duration_s: float


class MessageJob(View):
    """The job that a message is about, as it stands when the message is sent."""

    name: str
    state: JobState
    owner: str


class WebhookMessage(View):
    """What is posted to a webhook; a repeated message has the same ``id``."""

    id: str
    type: str
    job_id: str | None = None
    seq: int | None = None
    time: AwareDatetime
    body: dict[str, Any]
    job: MessageJob | None = None
