"""What a run tells while it happens: one small frozen value per fact, sent from the ranks to the service."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from service.jobs.numbers import say_non_finite
from service.jobs.states import Phase, Reason

RUNNER = -1
"""The rank number under which the runner itself, which is no rank, reports."""


class Telemetry(BaseModel):
    """Base of all facts. Non-finite numbers travel as the strings "NaN", "Infinity", "-Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", json_schema_extra=say_non_finite)


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


class Scores(Telemetry):
    """Mean cross-entropy in nats and share of right answers, both over the whole validation set."""

    loss: float
    accuracy: float


class Evaluation(Telemetry):
    """Validation with the stored running statistics, and the same weights with population statistics.

    ``loss_damage`` is stored minus population loss, a mean of per-image differences; ``loss_damage_se`` is its
    standard error over the ``num_images`` pairs. ``accuracy_damage`` is population minus stored accuracy, in
    shares of 1, with its paired standard error. Positive damage: the stored statistics do worse.
    """

    type: Literal["evaluation"] = "evaluation"
    step: int
    epoch: int
    num_images: int
    stored: Scores
    population: Scores
    loss_damage: float
    loss_damage_se: float
    accuracy_damage: float
    accuracy_damage_se: float


class LayerDrift(Telemetry):
    """Stored running statistics of one layer against the population's; `syncbn.drift` defines each number."""

    layer: str
    num_channels: int
    rms_mean_shift: float
    max_mean_shift: float
    max_mean_shift_channel: int
    mean_abs_log_var_ratio: float
    max_abs_log_var_ratio: float
    output_error: float
    rank_disagreement: float


class Drift(Telemetry):
    """Drift of every BatchNorm layer at one step, in execution order."""

    type: Literal["drift"] = "drift"
    step: int
    num_population_images: int
    layers: tuple[LayerDrift, ...]


class CheckpointSaved(Telemetry):
    """A whole checkpoint is on disk under ``path``."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    size_bytes: int
    duration_s: float


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
