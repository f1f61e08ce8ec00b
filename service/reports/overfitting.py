"""Says whether the validation loss has begun to rise while the training loss does not."""

import math
from collections.abc import Sequence

from scipy import stats

from service.jobs import Evaluation, Interval, Overfitting, OverfittingVerdict
from service.reports.margins import practical_size

PRACTICAL_SHARE = 0.01
ERROR_RATE = 0.05


def judge_overfitting(evaluations: Sequence[Evaluation]) -> Overfitting:
    """The verdict of the last evaluation against the best one before, image by image, in evaluation mode.

    Overfitting: the rise of the validation loss is above 0 and above 1 % of the best loss, while the loss of the
    training images has not risen by 1 %. None: the validation loss has not risen, or by less than 1 % as its
    interval shows, or the training loss rises with it. Undecided: everything else.

    The best of k evaluations is partly so by luck, and a run is looked at after each. The interval of
    `service.jobs.SinceBest` is therefore widened about ``rise`` from 95 % to Bonferroni's level for all k (k - 1) / 2
    pairs of evaluations: at most 5 % of runs whose validation loss rests are ever called overfitting.
    Where a step comes twice the later evaluation counts. Units: nats. Cost: O(evaluations).
    """
    by_step = {evaluation.step: evaluation for evaluation in evaluations}
    if not by_step:
        return _undecided("no evaluation is recorded yet", 0)
    last = by_step[max(by_step)]
    since = last.since_best
    if since is None or since.best_step == last.step:
        why = "there is no earlier evaluation of this attempt to compare with; set cadence.evaluate_every_steps"
        return _undecided(why, len(by_step), last.step)
    best = by_step.get(since.best_step)
    interval = _widened(since.rise, since.interval, len(by_step))
    train_change = last.train.loss - best.train.loss if best and best.train and last.train else None
    verdict, sentence = _judge(last, since.best_step, since.best_loss, since.rise, interval, train_change)
    return Overfitting(
        verdict=verdict,
        sentence=sentence,
        num_evaluations=len(by_step),
        best_step=since.best_step,
        step=last.step,
        rise=since.rise,
        interval=interval,
        train_change=train_change,
        gap=last.population.loss - last.train.loss if last.train else None,
    )


def _widened(rise: float, interval: Interval, num_evaluations: int) -> Interval:
    """Each side of a 95 % interval, stretched to the level that allows for all pairs of evaluations."""
    num_pairs = max(num_evaluations * (num_evaluations - 1) // 2, 1)
    stretch = float(stats.norm.isf(ERROR_RATE / 2 / num_pairs) / stats.norm.isf(0.025))
    return Interval(low=rise - stretch * (rise - interval.low), high=rise + stretch * (interval.high - rise))


def _judge(
    last: Evaluation, best_step: int, best_loss: float, rise: float, interval: Interval, train_change: float | None
) -> tuple[OverfittingVerdict, str]:
    margin = PRACTICAL_SHARE * practical_size(best_loss)
    rose = (
        f"the validation loss changed by {rise:+.3g} nats (interval {interval.low:+.3g} to {interval.high:+.3g}) since "
        f"step {best_step}, its best"
    )
    if not all(map(math.isfinite, (rise, interval.low, interval.high, margin))):
        return OverfittingVerdict.UNDECIDED, "Undecided: the evaluations hold numbers that are not finite."
    if rise <= 0:
        return OverfittingVerdict.NONE, f"No overfitting: step {last.step} has the best validation loss so far."
    if interval.high <= margin:
        return OverfittingVerdict.NONE, f"No overfitting: {rose}; less than {margin:.3g} does not matter."
    if not (interval.low > 0 and rise > margin):
        return OverfittingVerdict.UNDECIDED, (
            f"Undecided: {rose}; {last.num_images} validation images do not tell whether it rises by {margin:.3g}."
        )
    if train_change is None or last.train is None:
        return OverfittingVerdict.UNDECIDED, (
            f"Undecided: {rose}, but the loss of the training images at both steps is not recorded."
        )
    if not train_change <= PRACTICAL_SHARE * practical_size(last.train.loss):
        return OverfittingVerdict.NONE, (
            f"No overfitting, the training itself gets worse: {rose}, and the loss of the training images by "
            f"{train_change:+.3g}. Lower the learning rate."
        )
    return OverfittingVerdict.OVERFITTING, (
        f"Overfitting: {rose}, while the loss of the training images changed by {train_change:+.3g}. Stop at "
        f"step {best_step} (max_steps), use its checkpoint, or raise weight_decay."
    )


def _undecided(why: str, num_evaluations: int, step: int | None = None) -> Overfitting:
    return Overfitting(
        verdict=OverfittingVerdict.UNDECIDED,
        sentence=f"Undecided: {why}.",
        num_evaluations=num_evaluations,
        step=step,
    )
