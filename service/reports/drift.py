"""Says whether the stored running statistics may be shipped: measured damage decides, drift explains."""

import math
from collections.abc import Sequence

from service.jobs import Drift, DriftColour, DriftVerdict, Evaluation, JobSpec, LayerDrift
from service.reports.advice import about_batch
from service.reports.damage import Interval, accuracy_damage, colour_of, loss_damage, poor_under_both


def judge_drift(
    evaluations: Sequence[Evaluation],
    drift: Sequence[Drift],
    spec: JobSpec | None = None,
    *,
    num_classes: int | None = None,
) -> DriftVerdict:
    """The verdict of the last evaluation (`service.reports.damage.colour_of`), explained by the last drift sample.

    ``spec`` and ``num_classes``, which places guessing, let the sentence say why a network is poor. Numbers that are
    not finite end in red or undecided, never in an exception.
    Cost: O(evaluations + samples + layers).
    """
    sample = last_drift(drift)
    worst = worst_layer(sample)
    disagreement = _disagreement(sample)
    if not evaluations:
        return DriftVerdict(
            colour=DriftColour.UNDECIDED,
            sentence="Undecided: no evaluation is recorded yet; set cadence.evaluate_every_steps to look sooner.",
            worst_layer=worst,
            max_rank_disagreement=disagreement,
        )
    last = max(reversed(evaluations), key=lambda e: e.step)
    loss, accuracy = loss_damage(last), accuracy_damage(last)
    colour = colour_of(last)
    sentences = [_damage_sentence(colour, last, loss, accuracy)]
    if poor_under_both(last, num_classes) and math.isfinite(last.population.loss):
        sentences.append(_poor_sentence(last, spec))
    return DriftVerdict(
        colour=colour,
        sentence=" ".join(sentences),
        loss_damage=loss.mean,
        loss_damage_low=loss.low if loss.known else None,
        loss_damage_high=loss.high if loss.known else None,
        accuracy_damage=accuracy.mean,
        accuracy_damage_low=accuracy.low if accuracy.known else None,
        accuracy_damage_high=accuracy.high if accuracy.known else None,
        worst_layer=worst,
        max_rank_disagreement=disagreement,
    )


def last_drift(drift: Sequence[Drift]) -> Drift | None:
    """The sample of the latest step; of several the one that was told last."""
    return max(reversed(drift), key=lambda d: d.step, default=None)


def worst_layer(sample: Drift | None) -> LayerDrift | None:
    """The layer with the largest shift; one that is no number is worse than any."""
    return max(sample.layers, key=lambda d: _nan_last(d.rms_mean_shift), default=None) if sample else None


def _disagreement(sample: Drift | None) -> float | None:
    values = [layer.rank_disagreement for layer in sample.layers] if sample else []
    return max(values, key=_nan_last, default=None)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _damage_sentence(colour: DriftColour, last: Evaluation, loss: Interval, accuracy: Interval) -> str:
    if not math.isfinite(last.stored.loss):
        also = (
            "" if math.isfinite(last.population.loss) else ", and so do population statistics: the weights are broken"
        )
        return f"Do not ship: the stored statistics give a validation loss of {last.stored.loss}{also}."
    if colour is DriftColour.UNDECIDED and not (loss.known and accuracy.known and math.isfinite(last.population.loss)):
        return "Undecided: the evaluation holds numbers that are not finite, so the damage has no interval."
    measured = (
        f"stored statistics change the validation loss by {loss.mean:+.3g} nats (95 % interval {loss.low:+.3g} to "
        f"{loss.high:+.3g}) and the accuracy by {100 * (0 - accuracy.mean):+.2f} points, "
        f"from {last.population.loss:.4g} and {last.population.accuracy:.1%} with population statistics"
    )
    match colour:
        case DriftColour.GREEN if loss.high < 0:
            return f"Safe to ship: the stored statistics do even better; {measured}."
        case DriftColour.GREEN:
            return f"The stored statistics do no harm: {measured}."
        case DriftColour.AMBER:
            return f"The stored statistics do some harm: {measured}."
        case DriftColour.RED:
            return f"Do not ship these statistics: {measured}."
        case _:
            return f"Undecided: {last.num_images} images are too few to tell; {measured}."


def _poor_sentence(last: Evaluation, spec: JobSpec | None) -> str:
    cause = "the cause is not stale statistics; train longer or change the learning rate."
    if spec is not None and about_batch(spec):
        cause = (
            f"the cause is not stale statistics. Likely it is the {spec.normalization_batch_size} images that share "
            "a batch statistic in training, too few."
        )
    return (
        f"The network itself is poor: accuracy {last.stored.accuracy:.1%} stored, {last.population.accuracy:.1%} "
        f"population. Population statistics do not cure that, so {cause}"
    )
