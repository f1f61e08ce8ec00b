"""Says what is known of the running statistics in the newest checkpoint."""

import math
from collections.abc import Sequence

from service.jobs import CheckpointSaved, DriftColour, ShippingVerdict, StatisticsCertificate, loss_damage_colour


def judge_checkpoint(checkpoints: Sequence[CheckpointSaved]) -> ShippingVerdict | None:
    """The verdict on the checkpoint that was told last; None without one.

    Green: it holds population statistics too, or running ones that were measured at its own step and against which
    nothing speaks. Amber: more than 1 % of them is their initial value, or they are certain to cost 1 % of the
    loss (`service.jobs.loss_damage_colour`), or to give no finite one. Undecided: not measured, by too few
    images, or at another step.
    """
    if not checkpoints:
        return None
    saved = checkpoints[-1]
    certificate = saved.statistics
    if certificate is None:
        colour, sentence = DriftColour.UNDECIDED, "nothing was measured of its running statistics."
    elif certificate.recomputed:
        colour = DriftColour.GREEN
        sentence = f"it also holds population statistics of {certificate.num_images} images: ship those."
    else:
        colour, sentence = _judge(certificate, saved.step)
    return ShippingVerdict(
        colour=colour, sentence=f"Checkpoint of step {saved.step}: {sentence}", step=saved.step, certificate=certificate
    )


def _judge(certificate: StatisticsCertificate, step: int) -> tuple[DriftColour, str]:
    if certificate.is_young:
        return DriftColour.AMBER, (
            f"{certificate.initial_weight:.2g} of its running statistics is still what they began with, after "
            f"{certificate.num_batches} batches."
        )
    interval, damage = certificate.loss_damage_interval, certificate.loss_damage
    if damage is not None and not math.isfinite(damage):
        return DriftColour.AMBER, "its running statistics, or the population's too, give no finite validation loss."
    if damage is None or interval is None:
        return DriftColour.UNDECIDED, "what its running statistics cost was not measured."
    measured = (
        f"its running statistics change the validation loss by {damage:+.3g} nats (95 % interval {interval.low:+.3g} "
        f"to {interval.high:+.3g}, step {certificate.evaluated_step})"
    )
    colour = loss_damage_colour(interval.low, interval.high, certificate.population_loss)
    if colour.harmful:
        return DriftColour.AMBER, f"{measured}: ship population statistics instead."
    if colour is DriftColour.UNDECIDED:
        return DriftColour.UNDECIDED, f"{measured}: too few images to tell."
    if step not in (certificate.measured_step, certificate.evaluated_step):
        return DriftColour.UNDECIDED, f"{measured}, but the weights are those of step {step}."
    return DriftColour.GREEN, f"{measured}: nothing speaks against shipping them."
