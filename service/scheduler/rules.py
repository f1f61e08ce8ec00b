"""What the owner of a job wants to follow from how its run goes: judged on values, by nobody's clock."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from service.jobs import (
    Convergence,
    ConvergenceVerdict,
    JobSpec,
    LimitAction,
    LimitExceeded,
    Reason,
    StopRule,
    TargetVerdict,
    TimeToTarget,
)

LOSS_RULES = frozenset({StopRule.DIVERGED, StopRule.PLATEAU})
"""Rules that ask for the course of the training loss."""

SUCCESSES = frozenset({Reason.PLATEAU_REACHED, Reason.TARGET_REACHED})
"""Reasons for which a job saves and succeeds before its last step."""


@dataclass(frozen=True)
class Ruling:
    """Why a run shall not go on as it does, and the sentence that says so."""

    reason: Reason
    detail: str


def has_rules(spec: JobSpec) -> bool:
    """Whether anything may follow from how the run goes."""
    return bool(spec.stop_when) or may_pause(spec)


def may_pause(spec: JobSpec) -> bool:
    """Whether drift may pause the job."""
    return any(limit.action is LimitAction.PAUSE for limit in spec.drift_limits)


def rule(
    rules: Collection[StopRule],
    convergence: Convergence | None,
    target: TimeToTarget | None,
    exceeded: Sequence[LimitExceeded],
) -> Ruling | None:
    """The gravest of what holds: divergence, then what ends a run well, then drift beyond a limit that pauses.

    ``exceeded`` are the findings of limits that pause, in order; None stands for what is not known.
    """
    if StopRule.DIVERGED in rules and convergence and convergence.verdict is ConvergenceVerdict.DIVERGED:
        return Ruling(Reason.DIVERGED, convergence.sentence)
    if StopRule.TARGET in rules and target and target.verdict is TargetVerdict.REACHED:
        return Ruling(Reason.TARGET_REACHED, target.sentence)
    if StopRule.PLATEAU in rules and convergence and convergence.verdict is ConvergenceVerdict.PLATEAU:
        return Ruling(Reason.PLATEAU_REACHED, convergence.sentence)
    return Ruling(Reason.DRIFT_LIMIT, _drift_sentence(exceeded)) if exceeded else None


def _drift_sentence(exceeded: Sequence[LimitExceeded]) -> str:
    first = exceeded[0]
    same = sum(other.step == first.step for other in exceeded) - 1
    more = f" (and {same} more)" if same else ""
    return (
        f"Layer {first.layer}: {first.metric} {first.value:.3g} is above its limit of {first.above:g} "
        f"at step {first.step}{more}."
    )
