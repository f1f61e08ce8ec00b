"""How far a job has come, reckoned from what its ranks have just told."""

from collections.abc import Sequence

import numpy as np

from service.jobs import Drift, Evaluation, Progress, RankStarted, StepMetrics, TelemetryEvent

_MEMORY_STEPS = 20
"""Step times older than this count for less than a third in the smoothed step time."""


def advance(before: Progress | None, facts: Sequence[TelemetryEvent], step: int, loss: float | None) -> Progress | None:
    """Progress after ``facts``: ``step`` is the last of any rank, ``loss`` the newest that every rank has told.

    None until a rank has started, because only then the number of steps is known.
    """
    started = [fact for fact in facts if isinstance(fact, RankStarted)]
    if before is None and not started:
        return None
    total_steps = started[-1].total_steps if started else before.total_steps if before else 0
    steps = [fact for fact in facts if isinstance(fact, StepMetrics)]
    step_s = _smooth(before.step_s if before else None, [fact.step_s for fact in steps])
    told = {
        "step": step,
        "total_steps": total_steps,
        "epoch": max((fact.epoch for fact in steps), default=before.epoch if before else 0),
        "step_s": step_s,
        "remaining_s": None if step_s is None else step_s * max(total_steps - step, 0),
    }
    if loss is not None:
        told["train_loss"] = loss
    return Progress.model_validate((before.model_dump() if before else {}) | told | _checkups(facts))


def _smooth(before: float | None, durations: Sequence[float]) -> float | None:
    """An exponential mean in which each new duration weighs one in ``_MEMORY_STEPS``; non-finite ones are no time."""
    finite = [duration for duration in durations if np.isfinite(duration)]
    if not finite:
        return before
    mean = float(np.mean(finite))
    if before is None:
        return mean
    return mean + (before - mean) * (1 - 1 / _MEMORY_STEPS) ** len(finite)


def _checkups(facts: Sequence[TelemetryEvent]) -> dict[str, float]:
    told: dict[str, float] = {}
    for fact in facts:
        if isinstance(fact, Evaluation):
            told |= {"validation_loss": fact.stored.loss, "validation_accuracy": fact.stored.accuracy}
        elif isinstance(fact, Drift) and fact.layers:
            # numpy's maximum is NaN if any is; Python's depends on the order.
            told["worst_layer_drift"] = float(np.max([layer.rms_mean_shift for layer in fact.layers]))
    return told
