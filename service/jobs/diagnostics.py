"""What a job is asked to measure of its BatchNorm layers, and what shall follow from what it finds."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from service.jobs.spec_part import SpecPart


class Diagnostics(SpecPart):
    """What a run measures of its BatchNorm layers beside their drift; it changes nothing that is trained."""

    sample_every_steps: Annotated[int, Field(ge=1)] | None = 20
    """How often the layers of all ranks are sampled (`syncbn.monitor`), one small exchange each; null: never."""
    replay_steps: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Of how many of the last steps the batch statistics are kept, to tell what another momentum would have given."""


class Target(SpecPart):
    """What the validation shall reach, with the running statistics that a checkpoint ships."""

    metric: Literal["accuracy", "loss"] = "accuracy"
    value: Annotated[float, Field(gt=0)]


class StopRule(StrEnum):
    """What ends a run before its last step."""

    DIVERGED = "diverged"
    """The training loss has diverged: the job fails."""
    PLATEAU = "plateau"
    """The training loss no longer moves by anything that matters: the job saves and succeeds."""
    TARGET = "target"
    """The target is reached and confirmed by the next two evaluations: the job saves and succeeds."""


class DriftMetric(StrEnum):
    """What of a layer's drift a limit can be put on; the names are those of `service.jobs.LayerDrift`."""

    RMS_MEAN_SHIFT = "rms_mean_shift"
    MAX_MEAN_SHIFT = "max_mean_shift"
    MEAN_ABS_LOG_VAR_RATIO = "mean_abs_log_var_ratio"
    MAX_ABS_LOG_VAR_RATIO = "max_abs_log_var_ratio"
    OUTPUT_ERROR = "output_error"
    RANK_DISAGREEMENT = "rank_disagreement"


class LimitAction(StrEnum):
    """What follows when a limit is exceeded."""

    REPORT = "report"
    """It stands in the report."""
    ALERT = "alert"
    """It is also an event of the job, which webhooks are told."""
    PAUSE = "pause"
    """The job also saves and pauses."""
    RECOMPUTE = "recompute"
    """The running statistics are also replaced by the population's, there and then, on all ranks."""


class DriftLimit(SpecPart):
    """A limit on the drift of the layers whose path ``layers`` matches; looked at with every drift sample."""

    layers: Annotated[str, Field(min_length=1, max_length=200)] = "*"
    """A shell pattern: ``*`` for any characters, ``?`` for one."""
    metric: DriftMetric = DriftMetric.RMS_MEAN_SHIFT
    above: Annotated[float, Field(ge=0)]
    action: LimitAction = LimitAction.REPORT
