"""Everything that is recorded of one job, as its report is made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.jobs import (
    BatchNormSample,
    CheckpointSaved,
    Drift,
    Evaluation,
    Job,
    LimitExceeded,
    MetricSeries,
    ModeFault,
    MomentumReplay,
    NonFinite,
    RankStarted,
)


@dataclass(frozen=True)
class SampledLayers:
    """A sample of the BatchNorm layers and the attempt that took it: the rank doctor begins anew with each."""

    attempt: int
    sample: BatchNormSample


@dataclass(frozen=True)
class JobRecord:
    """What a report is made from; facts in the order in which they were told, all attempts in a row.

    Of ``samples`` the last one tells of ranks and channels, since it sums up its attempt; more of them only help to
    say which layer changed first. ``non_finite`` are pairs of rank and finding. ``seconds`` tells, for steps of
    evaluations, how long after the start of the job they were. ``start`` is what a rank said when it was ready.
    """

    job: Job
    num_attempts: int
    losses: MetricSeries
    """Of all training steps, best not thinned."""
    evaluations: Sequence[Evaluation] = ()
    drift: Sequence[Drift] = ()
    samples: Sequence[SampledLayers] = ()
    non_finite: Sequence[tuple[int, NonFinite]] = ()
    mode_faults: Sequence[ModeFault] = ()
    limits_exceeded: Sequence[LimitExceeded] = ()
    momentum_replay: MomentumReplay | None = None
    checkpoints: Sequence[CheckpointSaved] = ()
    start: RankStarted | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)
