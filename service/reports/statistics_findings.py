"""What was found of running statistics and ranks, with what to change."""

from collections.abc import Iterator, Sequence

from service.jobs import (
    Drift,
    DriftColour,
    DriftVerdict,
    Evaluation,
    FindingKind,
    JobFinding,
    JobSpec,
    MomentumVerdict,
    RankQuantity,
    RanksVerdict,
    Severity,
    StaleCause,
    StaleVerdict,
)
from service.reports import advice
from service.reports.findings import numbers, severity_of
from service.reports.ranks import buffers_apart, difference_sentence, is_certain, matters

_STALE_KINDS = {
    StaleCause.YOUNG: FindingKind.STATISTICS_YOUNG,
    StaleCause.NOISE: FindingKind.STATISTICS_NOISY,
    StaleCause.LAG: FindingKind.STATISTICS_LAG,
}


def of_damage(verdict: DriftVerdict, evaluation: Evaluation | None, spec: JobSpec) -> Iterator[JobFinding]:
    """Damage that is shown."""
    if evaluation is None or not verdict.colour.harmful:
        return
    yield JobFinding(
        kind=FindingKind.DAMAGE,
        severity=severity_of(verdict.colour),
        sentence=verdict.sentence,
        layer=verdict.worst_layer.layer if verdict.worst_layer else None,
        step=evaluation.step,
        evidence=numbers(
            loss_damage=verdict.loss_damage,
            loss_damage_low=verdict.loss_damage_low,
            loss_damage_high=verdict.loss_damage_high,
            accuracy_damage=verdict.accuracy_damage,
        ),
        advice=advice.recompute(evaluation, spec),
    )


def of_staleness(stale: StaleVerdict, momentum: MomentumVerdict | None, spec: JobSpec) -> Iterator[JobFinding]:
    """Statistics that are off, with the cause and its cure."""
    worst = stale.worst_layer
    if stale.colour in (DriftColour.GREEN, DriftColour.UNDECIDED) or stale.cause is None or worst is None:
        return
    yield JobFinding(
        kind=_STALE_KINDS[stale.cause],
        severity=severity_of(stale.colour),
        sentence=stale.sentence,
        layer=worst.layer,
        step=stale.step,
        evidence=numbers(
            rms_mean_shift=worst.rms_mean_shift,
            expected_mean_shift=worst.expected_mean_shift,
            max_abs_z=worst.max_abs_z,
            z_threshold=worst.z_threshold,
            initial_weight=stale.initial_weight,
            lag_steps=stale.lag_steps,
        ),
        advice=advice.against_staleness(spec, stale, momentum),
    )


def of_momentum(momentum: MomentumVerdict | None, damage: DriftColour) -> Iterator[JobFinding]:
    """A momentum that would have done better; where no damage is shown it is but a note, and no advice."""
    if momentum is None or momentum.better is None:
        return
    harmful = damage.harmful
    yield JobFinding(
        kind=FindingKind.MOMENTUM,
        severity=Severity.AMBER if harmful else Severity.NOTE,
        sentence=momentum.sentence,
        step=momentum.replay.step,
        evidence=numbers(used=momentum.replay.used, better=momentum.better),
        advice=advice.momentum_to_use(momentum.better) if harmful else "",
    )


def of_batch(spec: JobSpec, damage: DriftColour, *, poor: bool) -> Iterator[JobFinding]:
    """Too few images to a statistic, where something is wrong that comes of it."""
    line = advice.about_batch(spec)
    if line is not None and (poor or damage.harmful):
        yield JobFinding(
            kind=FindingKind.FEW_IMAGES,
            severity=Severity.AMBER,
            sentence=f"Only {spec.normalization_batch_size} images share a batch statistic.",
            evidence=numbers(normalization_batch_size=spec.normalization_batch_size),
            advice=line,
        )


def of_network(evaluation: Evaluation | None, *, poor: bool) -> Iterator[JobFinding]:
    """A network that is ``poor`` with any statistics."""
    if poor and evaluation is not None:
        yield JobFinding(
            kind=FindingKind.POOR_NETWORK,
            severity=Severity.AMBER,
            sentence=f"The network itself is poor: accuracy {evaluation.population.accuracy:.1%}, loss "
            f"{evaluation.population.loss:.4g} with population statistics, which no statistics cure.",
            step=evaluation.step,
            evidence=numbers(accuracy=evaluation.population.accuracy, loss=evaluation.population.loss),
            advice="Train longer or change the learning rate.",
        )


def of_ranks(verdict: RanksVerdict, drift: Sequence[Drift], spec: JobSpec) -> Iterator[JobFinding]:
    """Each rank that differs, repeats an image, or holds other statistics."""
    apart = buffers_apart(drift, spec) if spec.num_workers > 1 else None
    if apart or verdict.differing_ranks:
        for rank in verdict.differing_ranks or (None,):
            whose = "the ranks'" if rank is None else f"rank {rank}'s"
            yield JobFinding(
                kind=FindingKind.BUFFERS_DIFFER,
                severity=Severity.RED,
                sentence=f"Statistics are not synchronized: {whose} running statistics are not those of most.",
                layer=apart[0] if apart else None,
                rank=rank,
                step=verdict.step,
                evidence=numbers(rank_disagreement=apart[1] if apart else None),
                advice="Look for a layer that was not converted to SyncBatchNorm, has a process group of its own, or "
                "is called on some ranks only.",
            )
    for rank in verdict.repeating_ranks:
        yield JobFinding(
            kind=FindingKind.RANK_REPEATS,
            severity=Severity.RED,
            sentence=f"Rank {rank} is fed one image over and over.",
            rank=rank,
            step=verdict.step,
            advice=f"Look at how rank {rank} reads its images: at its loader, sampler and shard.",
        )
    for finding in filter(is_certain, verdict.findings):
        yield JobFinding(
            kind=FindingKind.RANK_DIFFERS,
            severity=Severity.RED if matters(finding) else Severity.AMBER,
            sentence=difference_sentence(finding, spec.num_workers),
            layer=finding.layer,
            rank=finding.rank,
            step=verdict.step,
            evidence=numbers(
                z=finding.z,
                threshold=finding.threshold,
                size=finding.size,
                channel=finding.channel,
                is_mean=finding.quantity is RankQuantity.MEAN,
            ),
            advice="Shuffle the images over all ranks, and prepare them alike on each." if matters(finding) else "",
        )
