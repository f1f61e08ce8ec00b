"""A job and its attempts as the service tells them."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service.jobs.numbers import say_non_finite
from service.jobs.spec import JobSpec
from service.jobs.states import JobState, Phase, Reason
from service.jobs.telemetry import AttemptEnded


class View(BaseModel):
    """What is read over the API; times are RFC 3339 in UTC, durations seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings", json_schema_extra=say_non_finite)


class Progress(View):
    """How far a job has come, from what its ranks last told."""

    step: int
    total_steps: int
    epoch: int
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    worst_layer_drift: float | None = None
    step_s: float | None = None
    remaining_s: float | None = None


class Job(View):
    """One job: what was asked for, where it stands, and how fresh that knowledge is."""

    id: str
    spec: JobSpec
    owner: str = "anonymous"
    """The principal who submitted it."""
    state: JobState
    phase: Phase | None = None
    reason: Reason | None = None
    detail: str = ""
    state_since: AwareDatetime
    """When the state last changed."""
    stop_saves: bool = False
    """Whether a job on its way to be cancelled first saves a checkpoint."""
    attempt: int = 0
    """Number of the newest attempt; 0 before the first."""
    progress: Progress | None = None
    queue_position: int | None = None
    """Of a queued job: its place among all that wait, from 1, as of the scheduler's last look."""
    retry_of: str | None = None
    """The ended job that this one takes up again."""
    start_checkpoint: str | None = None
    """The checkpoint file that the first attempt begins from, instead of from nothing."""
    checkpoint_requests: int = 0
    """How often someone has asked for a checkpoint."""
    version: int
    created_at: AwareDatetime
    updated_at: AwareDatetime
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None
    observed_at: AwareDatetime | None = None
    """When the cluster last answered a question about this job."""
    heartbeat_at: AwareDatetime | None = None
    """When the job itself last reported."""
    heartbeat_age_s: float | None = None
    stale: bool = False
    """Whether an active job has been silent for longer than three heartbeats: its state is a memory."""


class Attempt(View):
    """One try at running a job, as far as it has reported."""

    job_id: str
    number: int
    created_at: AwareDatetime
    heartbeat_at: AwareDatetime | None = None
    """When its runner last posted anything."""
    num_ranks_started: int = 0
    last_step: int = 0
    ended: AttemptEnded | None = None
    """The runner's last word, once it is spoken."""


class JobPage(View):
    """Newest jobs first; ``next_cursor`` is absent on the last page."""

    items: tuple[Job, ...]
    next_cursor: str | None = None


class JobEvent(View):
    """Something that happened to a job; ``seq`` counts per job from 1 without holes."""

    seq: Annotated[int, Field(ge=1)]
    time: datetime
    type: str
    attempt: int | None = None
    rank: int | None = None
    body: dict[str, Any]


class LogRecord(View):
    """One line of a job's log."""

    seq: int
    time: datetime
    attempt: int
    rank: int
    level: str
    text: str


class MetricSeries(View):
    """One metric over steps; ``downsampled`` names the method where points were left out."""

    name: str
    rank: int | None
    steps: tuple[int, ...]
    values: tuple[float, ...]
    num_points: int
    downsampled: str | None = None
