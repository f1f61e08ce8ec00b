"""Says whether the stored running statistics may be shipped: measured damage decides, drift explains."""

import math
from collections.abc import Sequence

from service.jobs import Drift, DriftColour, DriftVerdict, Evaluation, JobSpec, LayerDrift, Normalization
from service.reports import advice
from service.reports.damage import Interval, accuracy_damage, colour_of, loss_damage, poor_under_both


def judge_drift(
    evaluations: Sequence[Evaluation],
    drift: Sequence[Drift],
    spec: JobSpec | None = None,
    *,
    num_classes: int | None = None,
) -> DriftVerdict:
    """The verdict of the last evaluation (`service.reports.damage.colour_of`), explained by the last drift sample.

    One thing is red whatever the damage: buffers that differ between ranks under sync normalization. Without
    ``spec`` neither that nor advice on momentum and batch is given; ``num_classes`` places guessing. Numbers
    that are not finite end in red or undecided, never in an exception.
    Cost: O(evaluations + samples + layers).
    """
    sample = max(reversed(drift), key=lambda d: d.step, default=None)
    worst = _worst_layer(sample)
    disagreement = _disagreement(sample)
    differs = spec is not None and spec.normalization is Normalization.SYNC and disagreement not in (None, 0.0)
    if not evaluations:
        return DriftVerdict(
            colour=DriftColour.RED if differs else DriftColour.UNDECIDED,
            sentence=_differ_sentence(disagreement) if differs else "Undecided: no evaluation is recorded yet.",
            worst_layer=worst,
            max_rank_disagreement=disagreement,
            advice=() if differs else ("Set cadence.evaluate_every_steps to look sooner.",),
        )
    last = max(reversed(evaluations), key=lambda e: e.step)
    loss, accuracy = loss_damage(last), accuracy_damage(last)
    colour = colour_of(last)
    poor = poor_under_both(last, num_classes)
    sentences = [_damage_sentence(colour, last, loss, accuracy)]
    if poor:
        sentences.append(_poor_sentence(last, spec))
    if worst is not None:
        sentences.append(f"The worst layer is {worst.layer}: its mean is off by {worst.rms_mean_shift:.3g} sd (rms).")
    if differs:
        sentences.insert(0, _differ_sentence(disagreement))
    return DriftVerdict(
        colour=DriftColour.RED if differs else colour,
        sentence=" ".join(sentences),
        loss_damage=loss.mean,
        loss_damage_low=loss.low if loss.known else None,
        loss_damage_high=loss.high if loss.known else None,
        accuracy_damage=accuracy.mean,
        accuracy_damage_low=accuracy.low if accuracy.known else None,
        accuracy_damage_high=accuracy.high if accuracy.known else None,
        worst_layer=worst,
        max_rank_disagreement=disagreement,
        advice=_advice(colour, poor, last, sample, worst, spec),
    )


def _worst_layer(sample: Drift | None) -> LayerDrift | None:
    """The layer with the largest shift; one that is no number is worse than any."""
    return max(sample.layers, key=lambda d: _nan_last(d.rms_mean_shift), default=None) if sample else None


def _disagreement(sample: Drift | None) -> float | None:
    values = [layer.rank_disagreement for layer in sample.layers] if sample else []
    return max(values, key=_nan_last, default=None)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _differ_sentence(disagreement: float | None) -> str:
    return (
        f"The stored statistics differ between ranks by up to {disagreement:.3g} sd although they are synchronized: "
        "that is always wrong, look for a layer that was not converted or is called on some ranks only."
    )


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
    if spec is not None and advice.about_batch(spec):
        cause = (
            f"the cause is not stale statistics. Likely it is the {spec.normalization_batch_size} images that share "
            "a batch statistic in training, too few."
        )
    return (
        f"The network itself is poor: accuracy {last.stored.accuracy:.1%} stored, {last.population.accuracy:.1%} "
        f"population. Population statistics do not cure that, so {cause}"
    )


def _advice(
    colour: DriftColour,
    poor: bool,
    last: Evaluation,
    sample: Drift | None,
    worst: LayerDrift | None,
    spec: JobSpec | None,
) -> tuple[str, ...]:
    harmful = colour in (DriftColour.AMBER, DriftColour.RED)
    lines: list[str | None] = []
    if harmful and math.isfinite(last.population.loss):
        lines.append(advice.recompute(last))
    if harmful and spec is not None and sample is not None and worst is not None:
        lines.append(advice.about_momentum(spec, sample, worst))
    if (harmful or poor) and spec is not None:
        lines.append(advice.about_batch(spec))
    if colour is DriftColour.UNDECIDED:
        lines.append("Evaluate on more validation images to narrow the interval.")
    return tuple(line for line in lines if line)
