"""What to change about a job whose stored statistics do damage: plain words with the number to set."""

import math

from service.jobs import Drift, Evaluation, JobSpec, LayerDrift, Normalization

SMALL_BATCH = 8
"""Images. Below it a batch statistic of a fully connected layer is mostly noise."""
LEFT_OF_INITIAL = 0.01
STALE_SHIFT = 0.05


def recompute(evaluation: Evaluation) -> str:
    """What population statistics would gain before shipping."""
    stored, population = evaluation.stored, evaluation.population
    return (
        "Recompute the statistics before you ship: population statistics take the validation loss from "
        f"{stored.loss:.4g} to {population.loss:.4g} and the accuracy from {stored.accuracy:.1%} to "
        f"{population.accuracy:.1%}."
    )


def about_momentum(spec: JobSpec, drift: Drift, worst: LayerDrift) -> str | None:
    """Which momentum suits the run, judged by the age of the running average; None where nothing is to gain.

    After t updates with momentum a, ``(1 - a)^t`` of a buffer is still its initial value. Once that is gone,
    sampling noise of weights at rest leaves a shift of at most ``sqrt(a / (2 - a) / n)`` standard deviations for
    normalization batches of n images; more than that is lag behind moving weights, ``(1 - a) / a`` steps.
    """
    momentum, images = spec.bn_momentum, spec.normalization_batch_size
    steps = max(drift.step, 1)
    initial = (1 - momentum) ** steps
    if initial > LEFT_OF_INITIAL:
        needed = 1 - LEFT_OF_INITIAL ** (1 / steps)
        return (
            f"bn_momentum {momentum:g} is too small for {steps} steps: {initial:.0%} of the stored statistics is "
            f"still their initial value. Set it to at least {needed:.2g}."
        )
    if not worst.rms_mean_shift > STALE_SHIFT:
        return None
    noise = math.sqrt(momentum / (2 - momentum) / images)
    if worst.rms_mean_shift > 2 * noise:
        lag = (1 - momentum) / momentum
        return (
            f"The stored statistics trail the weights by about {lag:.3g} steps; let the learning rate fall towards "
            "the end (schedule cosine), or recompute the statistics after training."
        )
    ratio = STALE_SHIFT**2 * images
    calmer = max(2 * ratio / (1 + ratio), 1 - LEFT_OF_INITIAL ** (1 / steps))
    remedy = f"Lower bn_momentum to {calmer:.2g}, or normalize" if calmer < momentum else "Normalize"
    return (
        f"A shift of {worst.rms_mean_shift:.2g} is what sampling noise gives at bn_momentum {momentum:g} and "
        f"{images} images to a statistic (about {noise:.2g}). {remedy} over more images."
    )


def about_batch(spec: JobSpec) -> str | None:
    """Whether too few images share a statistic, and how many would."""
    images = spec.normalization_batch_size
    if images >= SMALL_BATCH:
        return None
    sharing = spec.num_workers if spec.normalization is Normalization.SYNC else 1
    remedy = f"raise batch_size_per_worker to at least {math.ceil(SMALL_BATCH / sharing)}"
    if spec.normalization is Normalization.LOCAL and spec.global_batch_size >= SMALL_BATCH:
        remedy += f", or set normalization to sync, over {spec.global_batch_size} images"
    elif spec.normalization is Normalization.LOCAL and spec.num_workers > 1:
        remedy = f"set normalization to sync, over {spec.global_batch_size} images, or {remedy}"
    return f"Only {images} images share a batch statistic, which is then mostly noise: {remedy}."
