"""Where a training run is going: the verdicts on its losses, as every reader gets them."""

from enum import StrEnum

from service.jobs.diagnostics import Target
from service.jobs.evaluation import Interval
from service.jobs.job import View
from service.jobs.layer_facts import NonFinitePlace


class ConvergenceVerdict(StrEnum):
    """Where the training loss is going."""

    IMPROVING = "improving"
    PLATEAU = "plateau"
    WORSENING = "worsening"
    DIVERGED = "diverged"
    STUCK = "stuck"
    """It rests at the loss of guessing: nothing is learned."""
    UNDECIDED = "undecided"


class NonFiniteOrigin(View):
    """The first tensor, in order of execution, that was not finite, and the ranks on which it was."""

    step: int
    ranks: tuple[int, ...]
    place: NonFinitePlace
    tensor: str
    detail: str = ""


class Convergence(View):
    """The course of the training loss, judged on means of blocks of steps.

    ``slope`` is the change of the loss over the judged window with its 95 % interval, ``margin`` the change
    that would matter; all in nats. They are absent where the points do not suffice.
    """

    verdict: ConvergenceVerdict
    sentence: str
    num_steps: int
    current_loss: float | None = None
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    margin: float | None = None
    block_steps: int | None = None
    num_blocks: int | None = None
    block_correlation: float | None = None
    first_non_finite_step: int | None = None
    non_finite: NonFiniteOrigin | None = None


class OverfittingVerdict(StrEnum):
    """Whether the validation loss has begun to rise while the training loss does not."""

    OVERFITTING = "overfitting"
    NONE = "none"
    UNDECIDED = "undecided"


class Overfitting(View):
    """How the validation loss stands to the best one, both with population statistics; in nats.

    ``interval`` of ``rise`` is widened for the number of evaluations, so that all looks at a run together are wrong
    in at most 5 % of runs. ``train_change`` is that of the training images between the same two evaluations, ``gap``
    the validation loss minus theirs, now.
    """

    verdict: OverfittingVerdict
    sentence: str
    num_evaluations: int
    best_step: int | None = None
    step: int | None = None
    rise: float | None = None
    interval: Interval | None = None
    train_change: float | None = None
    gap: float | None = None


class TargetVerdict(StrEnum):
    """Whether the target is reached."""

    REACHED = "reached"
    UNCONFIRMED = "unconfirmed"
    """The last evaluation is at the target; the next ones must say whether it stays there."""
    NOT_REACHED = "not_reached"
    """Not so far. For the time to target the run is censored at its last evaluation, never left out."""


class TimeToTarget(View):
    """What it took to reach the target: the first evaluation there that the next two confirm.

    Where the target is not reached, ``step``, ``num_images`` and ``wall_s`` are those of the last evaluation: the
    time is longer than that.
    """

    verdict: TargetVerdict
    sentence: str
    target: Target
    step: int | None = None
    num_images: int | None = None
    """Training images used, over all workers."""
    wall_s: float | None = None
    score: float | None = None
    """The score at ``step``."""


class MedianTime(View):
    """The Kaplan-Meier median over runs; None where too few runs got there to say it, or to bound it above."""

    num_runs: int
    num_reached: int
    median: float | None
    low: float | None
    high: float | None
    sentence: str


class DecayLaw(StrEnum):
    """The course that a falling loss L(t) is described by, t in steps."""

    POWER = "power"
    """``floor + amplitude * t ** -rate``"""
    EXPONENTIAL = "exponential"
    """``floor + amplitude * exp(-t / rate)``"""


class Decay(View):
    """The law that describes a falling training loss, with 95 % intervals; or why none can be told.

    ``floor`` is the loss that no number of steps would pass, ``rate`` the exponent of a power law or the steps per e of
    an exponential, ``after_as_many_steps_again`` the loss at twice the steps; all are absent where ``law`` is.
    """

    law: DecayLaw | None
    sentence: str
    num_steps: int
    floor: float | None = None
    floor_interval: Interval | None = None
    amplitude: float | None = None
    rate: float | None = None
    rate_interval: Interval | None = None
    after_as_many_steps_again: float | None = None
    after_as_many_steps_again_interval: Interval | None = None
    aicc_advantage: float | None = None
    """AICc of the other law minus this one's; below 2 both describe the losses about equally well."""


class LayerChange(View):
    """The first value of a layer's series that its 20 before it do not explain."""

    layer: str
    depth: int
    """Place in order of execution, from 0."""
    metric: str
    step: int
    value: float
    robust_z: float
    """Distance from the median of the values before, in their scaled median absolute deviations."""


class Attribution(View):
    """Which layers changed, the first to change first; what came first need not be the cause."""

    sentence: str
    threshold: float
    num_looks: int
    changes: tuple[LayerChange, ...]
