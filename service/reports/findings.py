"""Everything that the verdicts on a job found, as a list for programs, the gravest first."""

from collections.abc import Iterable, Iterator, Sequence

from service.jobs import (
    Attribution,
    ChannelState,
    Convergence,
    ConvergenceVerdict,
    DriftColour,
    FindingKind,
    JobFinding,
    LayerChannels,
    LimitAction,
    LimitExceeded,
    ModeFault,
    Overfitting,
    OverfittingVerdict,
    Severity,
    ShippingVerdict,
)

_KINDS, _SEVERITIES = tuple(FindingKind), tuple(Severity)
_MANY = 0.1
"""Share of a layer's channels from which on their state is one degree graver."""


def in_order(findings: Iterable[JobFinding]) -> tuple[JobFinding, ...]:
    """By severity, then gravity; of one kind as they came."""
    return tuple(sorted(findings, key=lambda f: (_SEVERITIES.index(f.severity), _KINDS.index(f.kind))))


def advice_of(findings: Iterable[JobFinding]) -> tuple[str, ...]:
    """What the findings advise, in their order, each line once."""
    return tuple(dict.fromkeys(finding.advice for finding in findings if finding.advice))


def severity_of(colour: DriftColour) -> Severity:
    """How much it matters that a number is amber or red."""
    return {DriftColour.RED: Severity.RED, DriftColour.AMBER: Severity.AMBER}.get(colour, Severity.NOTE)


def numbers(**values: float | None) -> dict[str, float]:
    """The evidence that there is."""
    return {name: float(value) for name, value in values.items() if value is not None}


def of_losses(convergence: Convergence, overfitting: Overfitting) -> Iterator[JobFinding]:
    """Where the losses go, if that is a bad place."""
    grave = {
        ConvergenceVerdict.DIVERGED: (FindingKind.DIVERGED, Severity.RED, "Lower the learning rate or warm it up."),
        ConvergenceVerdict.STUCK: (
            FindingKind.STUCK,
            Severity.RED,
            "Raise the learning rate tenfold, or look whether the labels belong to the images.",
        ),
        ConvergenceVerdict.WORSENING: (
            FindingKind.WORSENING,
            Severity.AMBER,
            "Lower the learning rate, or go back to an earlier checkpoint.",
        ),
    }
    if convergence.verdict in grave:
        kind, severity, advice = grave[convergence.verdict]
        step, origin = convergence.first_non_finite_step, convergence.non_finite
        yield JobFinding(
            kind=FindingKind.NON_FINITE if step is not None else kind,
            severity=severity,
            sentence=convergence.sentence,
            layer=origin.tensor or None if origin else None,
            rank=origin.ranks[0] if origin and len(origin.ranks) == 1 else None,
            step=step,
            evidence=numbers(
                current_loss=convergence.current_loss, slope=convergence.slope, slope_low=convergence.slope_low
            ),
            advice=advice,
        )
    if overfitting.verdict is OverfittingVerdict.OVERFITTING:
        yield JobFinding(
            kind=FindingKind.OVERFITTING,
            severity=Severity.AMBER,
            sentence=overfitting.sentence,
            step=overfitting.best_step,
            evidence=numbers(rise=overfitting.rise, train_change=overfitting.train_change, gap=overfitting.gap),
            advice=f"Stop at step {overfitting.best_step} (max_steps), or use the checkpoint there.",
        )


def of_change(attribution: Attribution | None) -> Iterator[JobFinding]:
    """The layer that changed first before a run diverged."""
    if attribution is not None and attribution.changes:
        first = attribution.changes[0]
        yield JobFinding(
            kind=FindingKind.FIRST_TO_CHANGE,
            severity=Severity.NOTE,
            sentence=attribution.sentence,
            layer=first.layer,
            step=first.step,
            evidence=numbers(value=first.value, robust_z=first.robust_z, threshold=attribution.threshold),
        )


def of_modes(faults: Sequence[ModeFault]) -> Iterator[JobFinding]:
    """Each layer in a wrong mode once, at the first step that proved it."""
    advice = {
        FindingKind.BATCH_IN_EVALUATION: "Call model.eval() before judging the model, and let no layer override it.",
        FindingKind.MOVED_IN_EVALUATION: "Call model.eval() before judging the model, and let no layer override it.",
        FindingKind.FROZEN_IN_TRAINING: "Call model.train() before each training step, and reach every layer in it.",
    }
    first: dict[tuple[FindingKind, str], list[ModeFault]] = {}
    for fault in faults:
        first.setdefault((FindingKind(fault.kind.value), fault.layer), []).append(fault)
    for (kind, layer), same in first.items():
        yield JobFinding(
            kind=kind,
            severity=Severity.RED,
            sentence=f"Layer {layer} is in the wrong mode: {same[0].detail}.",
            layer=layer,
            step=same[0].step,
            evidence={"num_times": float(len(same))},
            advice=advice[kind],
        )


def of_limits(exceeded: Sequence[LimitExceeded]) -> Iterator[JobFinding]:
    """Each limit and layer once, as it was last exceeded."""
    same: dict[tuple[int, str], list[LimitExceeded]] = {}
    for event in exceeded:
        same.setdefault((event.limit, event.layer), []).append(event)
    for events in same.values():
        last = events[-1]
        then = {
            LimitAction.REPORT: "",
            LimitAction.ALERT: "",
            LimitAction.PAUSE: "; the job was to pause",
            LimitAction.RECOMPUTE: "; the running statistics were recomputed",
        }[last.action]
        yield JobFinding(
            kind=FindingKind.DRIFT_LIMIT,
            severity=Severity.AMBER,
            sentence=f"Layer {last.layer} was beyond limit {last.limit} at step {last.step}: {last.metric} was "
            f"{last.value:.3g}, above {last.above:g}{then}.",
            layer=last.layer,
            step=last.step,
            evidence=numbers(limit=last.limit, value=last.value, above=last.above, num_times=len(events)),
        )


def of_channels(channels: Sequence[LayerChannels]) -> Iterator[JobFinding]:
    """Each layer with channels in a bad state, the graver if it is a tenth of them."""
    kinds = {
        ChannelState.DEAD: FindingKind.DEAD_CHANNELS,
        ChannelState.COLLAPSED: FindingKind.COLLAPSED_CHANNELS,
        ChannelState.EXPLODING: FindingKind.EXPLODING_CHANNELS,
        ChannelState.MUTED: FindingKind.MUTED_CHANNELS,
    }
    advice = {
        ChannelState.DEAD: "Lower the learning rate or the weight decay: dead channels learn nothing any more.",
        ChannelState.COLLAPSED: "Look at what feeds the collapsed channels: it is constant.",
        ChannelState.EXPLODING: "Lower the learning rate or warm it up.",
        ChannelState.MUTED: "",
    }
    for found in channels:
        yield JobFinding(
            kind=kinds[found.state],
            severity=_severity_of_channels(found),
            sentence=f"{found.num_in_state} of {found.num_channels} channels of layer {found.layer} are {found.state}: "
            f"{_listed(found)}.",
            layer=found.layer,
            evidence=numbers(num_in_state=found.num_in_state, num_channels=found.num_channels),
            advice=advice[found.state],
        )


def of_checkpoint(shipping: ShippingVerdict | None, damage: DriftColour) -> Iterator[JobFinding]:
    """What speaks against shipping the newest checkpoint; where damage is shown, advice is given already."""
    if shipping is None or shipping.colour is not DriftColour.AMBER or shipping.certificate is None:
        return
    certificate = shipping.certificate
    yield JobFinding(
        kind=FindingKind.CHECKPOINT,
        severity=Severity.AMBER,
        sentence=shipping.sentence,
        layer=certificate.worst_layer,
        step=shipping.step,
        evidence=numbers(
            initial_weight=certificate.initial_weight,
            rms_mean_shift=certificate.rms_mean_shift,
            loss_damage=certificate.loss_damage,
        ),
        advice=""
        if damage.harmful
        else "Set recompute_bn, so that checkpoints also hold population statistics, and ship those.",
    )


def _severity_of_channels(found: LayerChannels) -> Severity:
    many = found.num_in_state >= _MANY * found.num_channels
    if found.state is ChannelState.EXPLODING:
        return Severity.RED if many else Severity.AMBER
    return Severity.AMBER if many else Severity.NOTE


def _listed(found: LayerChannels) -> str:
    some = ", ".join(map(str, found.channels[:8]))
    rest = found.num_in_state - min(len(found.channels), 8)
    return f"{some} and {rest} more" if rest > 0 and some else some or "which ones varies"
