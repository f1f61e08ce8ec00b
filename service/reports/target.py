"""Says what it took a run to reach its target."""

from collections.abc import Mapping, Sequence

from service.jobs import Evaluation, Target, TargetVerdict, TimeToTarget

CONFIRMATIONS = 2
"""Evaluations after the first one at the target that must be there too: one lucky evaluation reaches nothing."""


def reach_target(
    evaluations: Sequence[Evaluation],
    target: Target,
    *,
    images_per_step: int | None = None,
    seconds: Mapping[int, float] | None = None,
) -> TimeToTarget:
    """The first evaluation at ``target``, with the stored statistics, that the next two confirm.

    ``seconds`` tells of steps of evaluations how long after the start of the job they were. A run that has not got
    there is censored at its last evaluation. Where a step comes twice the later evaluation counts, and a score that is
    no number is not at the target. Cost: O(evaluations).
    """
    by_step = {evaluation.step: evaluation for evaluation in evaluations}
    steps = sorted(by_step)
    there = [is_at(by_step[step], target) for step in steps]
    first = _first_confirmed(there)
    waiting = next((i for i in range(max(len(steps) - CONFIRMATIONS, 0), len(steps)) if all(there[i:])), None)
    step = steps[-1] if steps else None
    verdict = TargetVerdict.NOT_REACHED if waiting is None else TargetVerdict.UNCONFIRMED
    if first is not None:
        step, verdict = steps[first], TargetVerdict.REACHED
    images = step * images_per_step if step is not None and images_per_step else None
    wall_s = seconds.get(step) if step is not None and seconds else None
    return TimeToTarget(
        verdict=verdict,
        sentence=_sentence(verdict, target, step, images, wall_s, len(there) - (waiting or 0)),
        target=target,
        step=step,
        num_images=images,
        wall_s=wall_s,
        score=_score(by_step[step], target) if step is not None else None,
    )


def is_at(evaluation: Evaluation, target: Target) -> bool:
    """Whether an evaluation is at or beyond the target."""
    score = _score(evaluation, target)
    return score >= target.value if target.metric == "accuracy" else score <= target.value


def _score(evaluation: Evaluation, target: Target) -> float:
    return evaluation.stored.accuracy if target.metric == "accuracy" else evaluation.stored.loss


def _first_confirmed(there: Sequence[bool]) -> int | None:
    needed = 1 + CONFIRMATIONS
    return next((i for i in range(len(there) - CONFIRMATIONS) if all(there[i : i + needed])), None)


def _sentence(
    verdict: TargetVerdict, target: Target, step: int | None, images: int | None, wall_s: float | None, num_there: int
) -> str:
    goal = f"{target.metric} {target.value:g}"
    after = f"step {step}"
    if images is not None:
        after += f", {images} images"
    if wall_s is not None:
        after += f", {wall_s:.4g} s"
    match verdict:
        case TargetVerdict.REACHED:
            return f"Reached {goal} after {after}; the next {CONFIRMATIONS} evaluations confirm it."
        case TargetVerdict.UNCONFIRMED:
            missing = 1 + CONFIRMATIONS - num_there
            return f"At {goal} by {after}, to be confirmed by {missing} more evaluation{'s' if missing > 1 else ''}."
        case _ if step is None:
            return f"No evaluation says yet whether {goal} is reached; set cadence.evaluate_every_steps to look sooner."
        case _:
            return f"Has not reached {goal} by {after}."
