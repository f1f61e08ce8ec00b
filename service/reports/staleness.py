"""Says how far the running statistics are from the population's, and why."""

import math
from collections.abc import Sequence

from service.jobs import LEFT_OF_INITIAL, Drift, DriftColour, JobSpec, LayerDrift, StaleCause, StaleVerdict
from service.reports.drift import last_drift, worst_layer
from service.reports.margins import STALE_SHIFT

VERY_STALE_SHIFT = 0.2
WITHIN_CHANCE = 2.0
"""Times what sampling alone leaves: a shift up to that is put down to it."""


def judge_staleness(drift: Sequence[Drift], damage: DriftColour, spec: JobSpec) -> StaleVerdict:
    """The verdict on the worst layer of the last drift sample.

    Green below a shift of 0.05 sd, amber to 0.2, red beyond. Where no damage is measured it is never red, and green if
    chance explains a shift up to 0.2: beyond, it was luck that this step shows no damage. Where damage is shown,
    statistics that are still more than 1 % initial values are amber at least: a variance can be off where no mean is.
    The cause is the initial value, if more than 1 % of it is left; else chance, if the shift is at most twice what
    sampling leaves (or no channel's z passes its threshold); else lag.
    A shift that is no number is red, and has no cause to tell. Cost: O(samples + layers).
    """
    sample = last_drift(drift)
    worst = worst_layer(sample)
    if sample is None or worst is None:
        return StaleVerdict(
            colour=DriftColour.UNDECIDED,
            sentence="Undecided: no drift sample is recorded yet; set cadence.drift_every_steps to look sooner."
            if sample is None
            else "The model has no running statistics that could be stale.",
            step=sample.step if sample else None,
        )
    initial = _initial_weight(sample, spec)
    lag = worst.lag_steps if worst.lag_steps is not None else (1 - spec.bn_momentum) / spec.bn_momentum
    if not math.isfinite(worst.rms_mean_shift):
        return StaleVerdict(
            colour=DriftColour.RED,
            sentence=f"The running statistics of layer {worst.layer} or the population's are not finite (step "
            f"{sample.step}).",
            step=sample.step,
            worst_layer=worst,
            initial_weight=initial,
            lag_steps=lag,
        )
    cause = _cause(worst, initial, spec)
    colour = _colour(worst.rms_mean_shift)
    if colour is DriftColour.GREEN and initial > LEFT_OF_INITIAL and damage.harmful:
        colour = DriftColour.AMBER
    if damage is DriftColour.GREEN and colour is DriftColour.RED:
        colour = DriftColour.AMBER
    elif damage is DriftColour.GREEN and cause is StaleCause.NOISE:
        colour = DriftColour.GREEN
    return StaleVerdict(
        colour=colour,
        sentence=_sentence(colour, cause, sample.step, worst, initial, lag),
        cause=None if colour is DriftColour.GREEN else cause,
        step=sample.step,
        worst_layer=worst,
        initial_weight=initial,
        lag_steps=lag,
    )


def expected_shift(worst: LayerDrift, spec: JobSpec) -> float:
    """What sampling alone leaves in standard deviations: as recorded, or for fully connected layers at rest."""
    if worst.expected_mean_shift is not None:
        return worst.expected_mean_shift
    momentum = spec.bn_momentum
    return math.sqrt(momentum / (2 - momentum) / spec.normalization_batch_size)


def _initial_weight(sample: Drift, spec: JobSpec) -> float:
    recorded = [layer.initial_weight for layer in sample.layers if layer.initial_weight is not None]
    return max(recorded) if recorded else float((1 - spec.bn_momentum) ** sample.step)


def _colour(shift: float) -> DriftColour:
    if shift < STALE_SHIFT:
        return DriftColour.GREEN
    return DriftColour.AMBER if shift <= VERY_STALE_SHIFT else DriftColour.RED


def _cause(worst: LayerDrift, initial: float, spec: JobSpec) -> StaleCause:
    if initial > LEFT_OF_INITIAL:
        return StaleCause.YOUNG
    z, threshold = worst.max_abs_z, worst.z_threshold
    within = z is not None and threshold is not None and z <= threshold
    if within or worst.rms_mean_shift <= WITHIN_CHANCE * expected_shift(worst, spec):
        return StaleCause.NOISE
    return StaleCause.LAG


def _sentence(colour: DriftColour, cause: StaleCause, step: int, worst: LayerDrift, initial: float, lag: float) -> str:
    off = f"the running means of layer {worst.layer} are off by {worst.rms_mean_shift:.2g} sd (rms, step {step})"
    if colour is DriftColour.GREEN and worst.rms_mean_shift < STALE_SHIFT:
        return f"Up to date: at worst {off}; less than {STALE_SHIFT:g} does not matter."
    if colour is DriftColour.GREEN:
        return f"Up to date: at worst {off}, which is chance and does no measured harm."
    match cause:
        case StaleCause.YOUNG:
            return f"Too young: {off}, and {initial:.2g} of them is still their initial value."
        case StaleCause.NOISE:
            return f"Noisy: {off}, which chance explains: too few images share a statistic for this momentum."
        case StaleCause.LAG:
            return f"Behind: {off}, more than chance. They average over about {lag:.3g} steps of moving weights."
