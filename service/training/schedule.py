"""The learning rate as a pure function of the step, so that a resumed run needs no memory of it."""

import math

from service.jobs import Schedule


def learning_rate(step: int, base: float, schedule: Schedule, total_steps: int) -> float:
    """The rate for step ``step`` (from 1) of ``total_steps``.

    Warmup: ``base * step / warmup_steps``, full at its last step (Goyal et al. 2017, section 2.2). After it
    ``base``, or half a cosine: ``base / 2 * (1 + cos(pi * t))`` with ``t`` from 0 at the first step after the
    warmup towards 1, reached one step past the end (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return base * step / warmup
    if schedule.name == "constant":
        return base
    return base / 2 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total_steps - warmup)))


def check_schedule(schedule: Schedule, total_steps: int) -> None:
    """Raise ValueError where the warmup would not end before the run does."""
    if schedule.warmup_steps and schedule.warmup_steps >= total_steps:
        raise ValueError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, but the run has only {total_steps} steps; "
            "shorten the warmup, or raise epochs or max_steps"
        )
