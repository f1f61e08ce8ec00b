"""What to change about a job: plain words with the number to set."""

import math

from service.jobs import LEFT_OF_INITIAL, Evaluation, JobSpec, MomentumVerdict, Normalization, StaleCause, StaleVerdict
from service.reports.margins import STALE_SHIFT

SMALL_BATCH = 8
"""Images. Below it a batch statistic of a fully connected layer is mostly noise."""


def recompute(evaluation: Evaluation, spec: JobSpec) -> str:
    """What population statistics would gain before shipping; where checkpoints hold them, to ship those.

    Nothing where population statistics give no finite loss either.
    """
    stored, population = evaluation.stored, evaluation.population
    if not math.isfinite(population.loss):
        return ""
    how = "Recompute the statistics before you ship (recompute_bn)"
    if spec.recompute_bn:
        how = "Ship the population statistics that the checkpoint holds (python -m service.training.ship)"
    return (
        f"{how}: population statistics take the validation loss from "
        f"{stored.loss:.4g} to {population.loss:.4g} and the accuracy from {stored.accuracy:.1%} to "
        f"{population.accuracy:.1%}."
    )


def against_staleness(spec: JobSpec, stale: StaleVerdict, momentum: MomentumVerdict | None) -> str:
    """What cures the cause of stale statistics; a momentum that was replayed goes before one that is reckoned.

    After t updates with momentum a, ``(1 - a)^t`` of a buffer is still its initial value, and sampling leaves
    ``sqrt(a / (2 - a) / n)`` standard deviations in it for n images to a statistic.
    """
    if momentum is not None and momentum.better is not None:
        return momentum_to_use(momentum.better)
    steps, used = max(stale.step or 1, 1), spec.bn_momentum
    young = 1 - LEFT_OF_INITIAL ** (1 / steps)
    match stale.cause:
        case StaleCause.YOUNG if young > used:
            return (
                f"Raise bn_momentum from {used:g} to at least {young:.2g}, with which {steps} steps leave 1 % of the "
                "initial value; or set recompute_bn."
            )
        case StaleCause.YOUNG:
            return "Set recompute_bn: the running statistics have seen too few batches."
        case StaleCause.NOISE:
            images = spec.normalization_batch_size
            calmer = max(2 * STALE_SHIFT**2 * images / (1 + STALE_SHIFT**2 * images), young)
            more = f"normalize over more than {images} images"
            if calmer < used:
                return f"Lower bn_momentum from {used:g} to {calmer:.2g}, or {more}."
            return f"To calm the statistics, {more}."
        case StaleCause.LAG:
            return (
                "Let the learning rate fall towards the end (schedule cosine), or set recompute_bn: running statistics "
                f"trail by about {(1 - used) / used:.3g} steps at bn_momentum {used:g}."
            )
        case None:
            return ""


def momentum_to_use(better: float) -> str:
    """The replayed momentum, as something to set."""
    return f"Set bn_momentum to {better:g}."


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
