"""What a run tells while it happens: one small frozen value per fact, sent from the ranks to the service."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from service.jobs.evaluation import Evaluation
from service.jobs.fact import Telemetry
from service.jobs.layer_facts import (
    BatchNormSample,
    Drift,
    LimitExceeded,
    ModeFault,
    MomentumReplay,
    NonFinite,
    StatisticsCertificate,
)
from service.jobs.states import Phase, Reason

RUNNER = -1
"""The rank number under which the runner itself, which is no rank, reports."""


class RankStarted(Telemetry):
    """A rank is ready to train: where it runs, and from which step it goes on (0: from the beginning)."""

    type: Literal["rank_started"] = "rank_started"
    world_size: int
    host: str
    pid: int
    device: str
    resumed_step: int
    total_steps: int
    steps_per_epoch: int
    num_train_images: int
    num_validation_images: int
    num_classes: int
    num_parameters: int
    torch_version: str
    syncbn_version: str


class PhaseChanged(Telemetry):
    """The run as a whole has come to another phase."""

    type: Literal["phase_changed"] = "phase_changed"
    phase: Phase


class StepMetrics(Telemetry):
    """One optimizer step on one rank; ``step`` counts from 1, ``loss`` is the mean over the rank's images."""

    type: Literal["step"] = "step"
    step: int
    epoch: int
    loss: float
    learning_rate: float
    step_s: float


class CheckpointSaved(Telemetry):
    """A whole checkpoint is on disk under ``path``."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    size_bytes: int
    duration_s: float
    statistics: StatisticsCertificate | None = None


class ResumeCertificate(Telemetry):
    """Whether an attempt really goes on where the checkpoint of ``step`` was saved.

    A fixed probe batch is judged in evaluation mode when a checkpoint is saved and again when it has been restored;
    the digests are SHA-256 over the bits of all parameters, and of all BatchNorm running statistics. ``exact`` if
    all three pairs are equal, the losses to the last bit.
    """

    type: Literal["resume_certificate"] = "resume_certificate"
    step: int
    saved_by_num_workers: int
    num_workers: int
    saved_probe_loss: float
    restored_probe_loss: float
    saved_parameters_sha256: str
    restored_parameters_sha256: str
    saved_statistics_sha256: str
    restored_statistics_sha256: str
    exact: bool


class StoppedEarly(Telemetry):
    """A rank has left after ``step``, as it was told: all ranks at the same one."""

    type: Literal["stopped"] = "stopped"
    step: int
    checkpoint_saved: bool


class TrainingFinished(Telemetry):
    """A rank has taken its last step."""

    type: Literal["training_finished"] = "training_finished"
    step: int
    duration_s: float


class LogLine(Telemetry):
    """One line for a person to read."""

    type: Literal["log"] = "log"
    level: Literal["debug", "info", "warning", "error"] = "info"
    text: str


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"


class AttemptEnded(Telemetry):
    """The runner's last word: how the attempt ended, and why where it did not succeed."""

    type: Literal["attempt_ended"] = "attempt_ended"
    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    checkpoint_step: int | None = None
    """Of an attempt that stopped as it was told: the step of the checkpoint that it has just saved."""


TelemetryEvent = Annotated[
    RankStarted
    | PhaseChanged
    | StepMetrics
    | Evaluation
    | Drift
    | BatchNormSample
    | MomentumReplay
    | ModeFault
    | NonFinite
    | LimitExceeded
    | CheckpointSaved
    | ResumeCertificate
    | StoppedEarly
    | TrainingFinished
    | LogLine
    | AttemptEnded,
    Field(discriminator="type"),
]

TELEMETRY_EVENT: TypeAdapter[TelemetryEvent] = TypeAdapter(TelemetryEvent)


class RankBatch(Telemetry):
    """Facts of one rank in the order they happened; the first has sequence number ``first_seq`` (from 0).

    Sequence numbers count per attempt and rank without holes, so a repeated batch is recognized and dropped.
    """

    rank: Annotated[int, Field(ge=RUNNER)]
    first_seq: Annotated[int, Field(ge=0)]
    times: tuple[float, ...]
    """When each fact happened, in seconds since the epoch."""
    events: tuple[TelemetryEvent, ...]

    @model_validator(mode="after")
    def _one_time_for_each_event(self) -> Self:
        if len(self.times) != len(self.events):
            raise ValueError(f"{len(self.times)} times for {len(self.events)} events; give one for each")
        return self


class IngestBatch(Telemetry):
    """What a runner posts, at least every few seconds: an empty one is a heartbeat."""

    batches: tuple[RankBatch, ...]


class Control(StrEnum):
    """What the service wants of an attempt; every answer to an ingest carries it."""

    CONTINUE = "continue"
    STOP = "stop"
    """Agree on a step, save a checkpoint there, and leave."""
    ABORT = "abort"
    """Leave at once."""


class IngestReply(Telemetry):
    """The control word, and per rank the sequence number that the service expects next.

    ``checkpoint_requests`` counts how often someone has asked the job for a checkpoint, over its whole life: an
    attempt that finds it greater than when it last saved on request saves once more.
    """

    control: Control
    next_seq: dict[int, int]
    checkpoint_requests: int = 0
