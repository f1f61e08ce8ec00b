"""Says whether all ranks see equal data and hold the same running statistics."""

import math
from collections.abc import Sequence

from service.jobs import (
    BatchNormSample,
    Drift,
    DriftColour,
    JobSpec,
    Normalization,
    RankFinding,
    RankQuantity,
    RanksVerdict,
)
from service.reports.drift import last_drift

MIN_SIZE = 0.1
"""Standard deviations, or nats of log variance, where the finding itself names no other size that matters."""


def judge_ranks(sample: BatchNormSample | None, drift: Sequence[Drift], spec: JobSpec) -> RanksVerdict:
    """The verdict of the last sample, which sums up those before it, and on the buffers of the last drift sample.

    Red: under sync normalization buffers that differ, to the last bit; a rank that is fed one image over and over; or
    a rank that differs beyond chance and by 0.1 sd or more. Amber: beyond chance, but by less. Green: none of these.
    Chance is judged at 1 % over a whole run. Cost: O(samples + ranks + layers).
    """
    if spec.num_workers == 1:
        return RanksVerdict(colour=DriftColour.GREEN, sentence="One rank: there is nothing to compare.")
    differing = _differing(sample)
    sentences = _buffers_apart(sample, differing, drift, spec)
    if sample is not None:
        sentences += [_repeats(rank) for rank in sample.repeating_ranks]
    findings = sample.ranks if sample is not None else ()
    certain = sorted(filter(is_certain, findings), key=lambda f: -_share(f))
    red = bool(sentences) or any(map(matters, certain))
    sentences += [difference_sentence(finding, spec.num_workers) for finding in certain]
    if sentences:
        colour = DriftColour.RED if red else DriftColour.AMBER
    else:
        colour = DriftColour.GREEN if findings else DriftColour.UNDECIDED
        sentences = [_nothing(sample, spec)]
    return RanksVerdict(
        colour=colour,
        sentence=" ".join(sentences),
        step=sample.step if sample is not None else None,
        worst=max(findings, key=lambda f: (matters(f), is_certain(f), _share(f)), default=None),
        findings=findings,
        repeating_ranks=sample.repeating_ranks if sample is not None else (),
        differing_ranks=differing,
        not_compared=sample.not_compared if sample is not None else (),
    )


def is_certain(finding: RankFinding) -> bool:
    """Whether a difference is more than chance; a number that is no number is not."""
    return abs(finding.z) > finding.threshold


def matters(finding: RankFinding) -> bool:
    """Whether a difference is certain, and large enough."""
    return is_certain(finding) and abs(finding.size) >= (MIN_SIZE if finding.min_size is None else finding.min_size)


def difference_sentence(finding: RankFinding, num_ranks: int) -> str:
    """Which rank differs, where and by how much; of two ranks nothing tells which one is right."""
    who = f"Rank {finding.rank} sees other data than the rest"
    if num_ranks == 2:
        who = f"Rank {finding.rank} sees other data than the other one (which of the two is right, nothing tells)"
    what = f"in layer {finding.layer}, channel {finding.channel}, its {finding.quantity} is "
    if finding.quantity is RankQuantity.MEAN:
        by = f"{abs(finding.size):.2g} sd {'above' if finding.size > 0 else 'below'} theirs"
    else:
        by = f"{math.exp(min(finding.size, 700.0)):.3g} times theirs"
    small = "" if matters(finding) else ", which is certain but too little to matter"
    return f"{who}: {what}{by}{small}."


def buffers_apart(drift: Sequence[Drift], spec: JobSpec) -> tuple[str, float] | None:
    """The layer whose synchronized buffers differ most between ranks and by how much; None if they are equal."""
    sample = last_drift(drift)
    if spec.normalization is not Normalization.SYNC or sample is None:
        return None
    apart = [(layer.rank_disagreement, layer.layer) for layer in sample.layers if layer.rank_disagreement > 0]
    return max(apart)[::-1] if apart else None


def _differing(sample: BatchNormSample | None) -> tuple[int, ...]:
    by_layer = sample.differing_ranks.values() if sample is not None else ()
    return tuple(sorted({rank for ranks in by_layer for rank in ranks}))


def _buffers_apart(
    sample: BatchNormSample | None, differing: tuple[int, ...], drift: Sequence[Drift], spec: JobSpec
) -> list[str]:
    apart = buffers_apart(drift, spec)
    if not apart and not differing:
        return []
    layer, size = apart if apart else (next(iter(sample.differing_ranks)) if sample else "", math.nan)
    by = f" by up to {size:.3g} sd" if apart else ""
    whose = f" Those of rank{'s' * (len(differing) > 1)} {_listed(differing)} are not like most." if differing else ""
    return [
        f"The running statistics differ between ranks{by} (layer {layer}) although they are synchronized: that is "
        "always wrong, look for a layer that was not converted, has a process group of its own, or is called on some "
        f"ranks only.{whose}"
    ]


def _repeats(rank: int) -> str:
    return f"Rank {rank} is fed one image over and over."


def _nothing(sample: BatchNormSample | None, spec: JobSpec) -> str:
    if spec.diagnostics.sample_every_steps is None:
        return "Undecided: layers are not sampled; set diagnostics.sample_every_steps."
    if sample is None or not sample.ranks:
        return (
            "Undecided: too few steps are sampled yet to compare ranks, from the fifth on they are; lower "
            "diagnostics.sample_every_steps to know sooner."
        )
    largest = max(sample.ranks, key=_share)
    return (
        f"All ranks see equal data, as far as {largest.num_samples} sampled steps tell: they differ by at most "
        f"{abs(largest.z):.2g} standard errors, and {largest.threshold:.2g} would be more than chance."
    )


def _share(finding: RankFinding) -> float:
    share = abs(finding.z) / finding.threshold if finding.threshold else math.inf
    return -1.0 if math.isnan(share) else share


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks))
