"""What a run tells of its validation."""

from typing import Literal

from service.jobs.fact import Telemetry


class Scores(Telemetry):
    """Mean cross-entropy in nats and share of right answers, both over the whole validation set."""

    loss: float
    accuracy: float


class Interval(Telemetry):
    """A 95 % interval from the bootstrap over images."""

    low: float
    high: float


class SinceBest(Telemetry):
    """How the validation loss stands to the best evaluation before it, both with population statistics.

    ``rise`` is the mean over images of the loss now minus the loss then, in nats, with its bootstrap ``interval``;
    below 0 this evaluation is the new best.
    """

    best_step: int
    best_loss: float
    rise: float
    interval: Interval


class DataShift(Telemetry):
    """How validation images look to the first BatchNorm layer, in order of execution, against training images.

    Shifts are in standard deviations of the training images, ratios of variances in nats; ``mean_p`` and ``var_p`` are
    probabilities under chance alone, as `syncbn.drift.LayerShift` defines them. ``max_mean_shift_is_higher`` tells the
    direction of that channel; ``mean_log_var_ratio`` above 0 that validation images vary more. ``moved``: beyond chance
    and by enough to matter, and not as images that were learned by heart make validation images move.
    """

    layer: str
    rms_mean_shift: float
    max_mean_shift: float
    max_mean_shift_channel: int
    max_mean_shift_is_higher: bool
    mean_log_var_ratio: float
    mean_abs_log_var_ratio: float
    mean_p: float
    var_p: float
    moved: bool


class Evaluation(Telemetry):
    """Validation with the stored running statistics, and the same weights with population statistics.

    ``loss_damage`` is stored minus population loss, a mean of per-image differences; ``loss_damage_se`` is its
    standard error over the ``num_images`` pairs. ``accuracy_damage`` is population minus stored accuracy, in
    shares of 1, with its paired standard error. Positive damage: the stored statistics do worse. The intervals are
    `syncbn.bootstrap`'s.
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
    loss_damage_interval: Interval | None = None
    accuracy_damage_interval: Interval | None = None
    train: Scores | None = None
    """The training images that stand for the population, judged as ``population`` is: in evaluation mode."""
    since_best: SinceBest | None = None
    data_shift: DataShift | None = None
    """Whether validation images look different from training images. None where no BatchNorm layer tells."""
