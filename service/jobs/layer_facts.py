"""What a run tells of its BatchNorm layers."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from service.jobs.diagnostics import DriftMetric, LimitAction
from service.jobs.evaluation import Interval
from service.jobs.fact import Telemetry


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
    weighted_output_error: float | None = None
    median_symmetric_kl: float | None = None
    rms_wasserstein: float | None = None
    median_hellinger: float | None = None
    median_jensen_shannon: float | None = None
    max_abs_z: float | None = None
    """Of the running mean against the population's, in standard errors of what sampling alone leaves between them."""
    z_threshold: float | None = None
    """What the largest such number of all layers' channels passes by chance in one of a hundred samples."""
    expected_mean_shift: float | None = None
    """The ``rms_mean_shift`` that sampling alone leaves."""
    initial_weight: float | None = None
    """How much of the running statistics is still their initial value."""
    lag_steps: float | None = None


class Drift(Telemetry):
    """Drift of every BatchNorm layer at one step, in execution order."""

    type: Literal["drift"] = "drift"
    step: int
    num_population_images: int
    layers: tuple[LayerDrift, ...]


class LayerSample(Telemetry):
    """One BatchNorm layer in one training step, over all ranks; `syncbn.monitor` defines each number.

    The four lists name channels, at most 32 each; the counts beside them are complete.
    """

    layer: str
    num_channels: int
    num_images: int
    positions_per_image: int
    design_effect: float
    mean_shift_noise: float
    share_beyond_3: float
    max_abs_z: float
    max_abs_z_channel: int
    buffers_equal: bool
    num_dead: int
    num_collapsed: int
    num_exploding: int
    num_muted: int
    dead: tuple[int, ...] = ()
    collapsed: tuple[int, ...] = ()
    exploding: tuple[int, ...] = ()
    muted: tuple[int, ...] = ()


class RankQuantity(StrEnum):
    """In what a rank's batches can differ from those of the others."""

    MEAN = "mean"
    VARIANCE = "variance"


class RankFinding(Telemetry):
    """Where one rank's batches differ most from those of all others in the same steps.

    ``z`` is in standard errors over ``num_samples`` sampled steps and passes ``threshold`` by chance in less than one
    of a hundred runs, however many samples are looked at. ``size`` is in standard deviations for the mean, in nats of
    log variance for the variance; its sign is that of ``z``. Below ``min_size`` it does not matter, however certain.
    """

    rank: int
    layer: str
    channel: int
    quantity: RankQuantity
    z: float
    threshold: float
    size: float
    num_samples: int
    min_size: float | None = None


class BatchNormSample(Telemetry):
    """What the BatchNorm layers of all ranks saw in one training step; layers in order of execution.

    ``ranks`` has one finding for each rank, its largest; empty with one rank or too few samples. ``repeating_ranks``
    are fed one image over and over. ``differing_ranks`` are those, by layer, whose running statistics are not those
    of most, although the layer is synchronized, or who synchronize with another number of ranks than most.
    ``not_compared`` are layers behind one that not all ranks synchronize: what reaches them differs by rank even if
    the data do not.
    """

    type: Literal["batch_norm_sample"] = "batch_norm_sample"
    step: int
    layers: tuple[LayerSample, ...]
    ranks: tuple[RankFinding, ...] = ()
    repeating_ranks: tuple[int, ...] = ()
    differing_ranks: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    not_compared: tuple[str, ...] = ()


class ReplayedMomentum(Telemetry):
    """What running statistics with another momentum would have been, against the population at the same weights.

    Drift is that of the worst layer.
    """

    momentum: float
    rms_mean_shift: float
    output_error: float

    @model_validator(mode="before")
    @classmethod
    def _without_scores(cls, fields: Any) -> Any:
        """Facts that were told by earlier versions name scores, which were always none."""
        if isinstance(fields, dict) and fields.get("scores", ...) is None:
            return {name: value for name, value in fields.items() if name != "scores"}
        return fields


class MomentumReplay(Telemetry):
    """The running statistics replayed from the batches of the last ``num_steps`` steps, with each momentum."""

    type: Literal["momentum_replay"] = "momentum_replay"
    step: int
    num_steps: int
    used: float
    best: float
    candidates: tuple[ReplayedMomentum, ...]


class ModeFaultKind(StrEnum):
    """What proves that a layer is in the wrong mode; none of it needs a threshold."""

    BATCH_IN_EVALUATION = "batch_in_evaluation"
    """An image is judged otherwise alone than among others."""
    MOVED_IN_EVALUATION = "moved_in_evaluation"
    """Running statistics or their counter moved while the model was only judged."""
    FROZEN_IN_TRAINING = "frozen_in_training"
    """The counter of batches stands still while the model trains."""


class ModeFault(Telemetry):
    """A layer is in the wrong mode."""

    type: Literal["mode_fault"] = "mode_fault"
    step: int
    kind: ModeFaultKind
    layer: str
    detail: str


class NonFinitePlace(StrEnum):
    """Where a number that is not finite can first be, in order of execution."""

    PARAMETER = "parameter"
    RUNNING_STATISTICS = "running_statistics"
    INPUT = "input"
    ACTIVATION = "activation"
    LOSS = "loss"
    OTHER_RANK = "other_rank"
    """Not here: what this rank computes alone is finite, so it came from another one."""


class NonFinite(Telemetry):
    """The first tensor of this rank, in order of execution, that is not finite in a step whose loss is not."""

    type: Literal["non_finite"] = "non_finite"
    step: int
    place: NonFinitePlace
    tensor: str
    """Path of the parameter, buffer or module; empty for input and loss."""
    detail: str = ""


class LimitExceeded(Telemetry):
    """A layer's drift is beyond one of the spec's ``drift_limits``, whose place in the list is ``limit``."""

    type: Literal["limit_exceeded"] = "limit_exceeded"
    step: int
    limit: int
    layer: str
    metric: DriftMetric
    value: float
    above: float
    action: LimitAction


LEFT_OF_INITIAL = 0.01
"""Share. With more of their initial value in them, running statistics are too young."""


class StatisticsCertificate(Telemetry):
    """What is known of the running statistics in a checkpoint, so that who loads it need not trust them blindly.

    ``recomputed`` says that the checkpoint also holds population statistics, by ``estimator`` from ``num_images``.
    ``initial_weight`` is how much of the stored ones is still their initial value, ``lag_steps`` how far a moving
    average trails moving weights. What was measured of drift is of ``measured_step``, the damage of ``evaluated_step``,
    the last evaluation's, as is ``population_loss``, in nats.
    """

    estimator: str
    num_images: int
    recomputed: bool
    worst_layer: str
    rms_mean_shift: float
    initial_weight: float
    lag_steps: float
    num_batches: int
    measured_step: int | None = None
    evaluated_step: int | None = None
    loss_damage: float | None = None
    loss_damage_interval: Interval | None = None
    population_loss: float | None = None

    @property
    def is_young(self) -> bool:
        """Whether too much of the stored statistics is still their initial value, or it is not known how much."""
        return not self.initial_weight <= LEFT_OF_INITIAL
