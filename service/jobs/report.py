"""The report on a job: three numbers with their colours, the verdicts, what was found, and what to change."""

from enum import StrEnum

from pydantic import Field

from service.jobs.convergence import Attribution, Convergence, Decay, Overfitting, TimeToTarget
from service.jobs.evaluation import Evaluation
from service.jobs.job import View
from service.jobs.layer_facts import LayerDrift, MomentumReplay, RankFinding, StatisticsCertificate
from service.jobs.spec import Normalization
from service.jobs.states import JobState


class DriftColour(StrEnum):
    """How a number is to be taken."""

    GREEN = "green"
    AMBER = "amber"
    RED = "red"
    UNDECIDED = "undecided"

    @property
    def harmful(self) -> bool:
        """Whether something is shown that matters."""
        return self in (DriftColour.AMBER, DriftColour.RED)


class DriftVerdict(View):
    """The first number: whether the stored statistics may be shipped, which measured damage alone decides.

    ``loss_damage`` and ``accuracy_damage`` are what the stored statistics cost against population statistics
    on the same weights and images, with 95 % intervals; positive is worse. ``worst_layer`` and
    ``max_rank_disagreement`` are of the last drift sample and explain.
    """

    colour: DriftColour
    sentence: str
    loss_damage: float | None = None
    loss_damage_low: float | None = None
    loss_damage_high: float | None = None
    accuracy_damage: float | None = None
    accuracy_damage_low: float | None = None
    accuracy_damage_high: float | None = None
    worst_layer: LayerDrift | None = None
    max_rank_disagreement: float | None = None


class StaleCause(StrEnum):
    """Why running statistics are not those of the population."""

    YOUNG = "young"
    """More than 1 % of them is still their initial value."""
    NOISE = "noise"
    """Chance: too few images share a statistic for the momentum."""
    LAG = "lag"
    """They trail moving weights, or were never those of these weights."""


class StaleVerdict(View):
    """The second number: how far the running means of the worst layer are from the population's.

    It explains damage, and a shift is never red where the damage is green. ``cause`` is absent where there is nothing
    to explain, or nothing finite to explain it by.
    """

    colour: DriftColour
    sentence: str
    cause: StaleCause | None = None
    step: int | None = None
    worst_layer: LayerDrift | None = None
    initial_weight: float | None = None
    """How much of the running statistics is still their initial value."""
    lag_steps: float | None = None


class RanksVerdict(View):
    """The third number: whether all ranks see equal data and hold the same running statistics.

    ``worst`` is the largest of ``findings``, one for each rank that was compared, by its share of its threshold.
    """

    colour: DriftColour
    sentence: str
    step: int | None = None
    worst: RankFinding | None = None
    findings: tuple[RankFinding, ...] = ()
    repeating_ranks: tuple[int, ...] = ()
    differing_ranks: tuple[int, ...] = ()
    """Those whose running statistics are not those of most, although they are synchronized."""
    not_compared: tuple[str, ...] = ()


class ChannelState(StrEnum):
    """What can be wrong with a channel; `syncbn.monitor` defines each."""

    DEAD = "dead"
    COLLAPSED = "collapsed"
    EXPLODING = "exploding"
    MUTED = "muted"


class LayerChannels(View):
    """The channels of one layer that were in one state in each of the last samples, three or more."""

    layer: str
    state: ChannelState
    num_channels: int
    """Of the layer."""
    num_in_state: int
    channels: tuple[int, ...]
    """At most 32."""


class MomentumVerdict(View):
    """What other momenta of the running statistics would have given, replayed from the last steps of the run."""

    sentence: str
    better: float | None
    """The momentum to use instead; None where the one in use does about as well."""
    replay: MomentumReplay


class ShippingVerdict(View):
    """What is known of the running statistics in the newest checkpoint; amber where something speaks against them."""

    colour: DriftColour
    sentence: str
    step: int
    certificate: StatisticsCertificate | None = None


class FindingKind(StrEnum):
    """What can be found of a job, the gravest first: among equally severe findings this is their order."""

    NON_FINITE = "non_finite"
    DIVERGED = "diverged"
    STUCK = "stuck"
    BATCH_IN_EVALUATION = "batch_in_evaluation"
    MOVED_IN_EVALUATION = "moved_in_evaluation"
    FROZEN_IN_TRAINING = "frozen_in_training"
    BUFFERS_DIFFER = "buffers_differ"
    RANK_REPEATS = "rank_repeats"
    RANK_DIFFERS = "rank_differs"
    OTHER_DATA = "other_data"
    """Validation images look different from training images."""
    DAMAGE = "damage"
    STATISTICS_YOUNG = "statistics_young"
    STATISTICS_NOISY = "statistics_noisy"
    STATISTICS_LAG = "statistics_lag"
    MOMENTUM = "momentum"
    FEW_IMAGES = "few_images"
    """Too few images share a batch statistic."""
    WORSENING = "worsening"
    OVERFITTING = "overfitting"
    POOR_NETWORK = "poor_network"
    """Population statistics do not cure it."""
    EXPLODING_CHANNELS = "exploding_channels"
    COLLAPSED_CHANNELS = "collapsed_channels"
    DEAD_CHANNELS = "dead_channels"
    MUTED_CHANNELS = "muted_channels"
    DRIFT_LIMIT = "drift_limit"
    CHECKPOINT = "checkpoint"
    FIRST_TO_CHANGE = "first_to_change"


class Severity(StrEnum):
    """How much a finding matters."""

    RED = "red"
    """The result cannot be trusted as it is."""
    AMBER = "amber"
    """Something is wrong, and may matter."""
    NOTE = "note"
    """Good to know."""


class JobFinding(View):
    """One thing that was found, for programs as for people: what, where, how badly, and by which numbers.

    ``layer``, ``rank``, ``step`` are there where the finding is of one. ``evidence`` are the numbers behind the
    sentence, by the names they have elsewhere. ``advice`` says what to change, with the number to set.
    """

    kind: FindingKind
    severity: Severity
    sentence: str
    layer: str | None = None
    rank: int | None = None
    step: int | None = None
    evidence: dict[str, float] = Field(default_factory=dict)
    advice: str = ""


class JobReport(View):
    """Everything a person needs to judge a job on one page. ``complete`` once the job is terminal.

    ``drift``, ``stale`` and ``ranks`` are the three numbers to look at first. ``findings`` are ordered by severity,
    then gravity; ``advice`` is theirs in that order, each line once. Both are empty where nothing is wrong.
    """

    job_id: str
    name: str
    state: JobState
    normalization: Normalization
    complete: bool
    num_steps: int
    training_s: float | None
    num_attempts: int
    drift: DriftVerdict
    stale: StaleVerdict
    ranks: RanksVerdict
    findings: tuple[JobFinding, ...]
    advice: tuple[str, ...]
    convergence: Convergence
    overfitting: Overfitting
    decay: Decay
    target: TimeToTarget | None
    """None where the spec sets no target."""
    channels: tuple[LayerChannels, ...]
    momentum: MomentumVerdict | None
    """None where no replay is recorded: it comes with the last look of a run."""
    checkpoint: ShippingVerdict | None
    """Of the newest checkpoint; None where there is none."""
    first_to_change: Attribution | None
    """Where the run has diverged: which layers changed before it did."""
    last_evaluation: Evaluation | None
    evaluations: tuple[Evaluation, ...]
