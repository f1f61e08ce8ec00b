"""From the scores of single images to an evaluation: paired differences, and how far their means can be trusted."""

import math

import torch
from torch import Tensor

from service.jobs import DataShift, Evaluation, Interval, Scores, SinceBest
from syncbn.bootstrap import mean_interval


class BestEvaluation:
    """The loss of each validation image at the best evaluation so far, by the mean loss with population statistics.

    ``losses`` are float64 ``(N,)`` on the CPU, those of ``step``; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.step = 0
        self.losses: Tensor | None = None

    def restore(self, step: int, losses: Tensor | None) -> None:
        """Go on from what a checkpoint holds."""
        self.step, self.losses = step, losses

    def since(self, losses: Tensor, step: int) -> SinceBest | None:
        """How ``losses`` ``(N,)`` at ``step`` stand to the best before, None at the first; they may become the best.

        Losses that are not finite never do.
        """
        before_step, before = self.step, self.losses
        mean = losses.mean()
        if mean.isfinite() and (before is None or mean < before.mean()):
            self.step, self.losses = step, losses.clone()
        if before is None:
            return None
        rise = losses - before
        return SinceBest(
            best_step=before_step,
            best_loss=before.mean().item(),
            rise=rise.mean().item(),
            interval=_interval(rise, step),
        )


def compare(
    stored: Tensor,
    precise: Tensor,
    train: Tensor,
    best: BestEvaluation,
    step: int,
    epoch: int,
    data_shift: DataShift | None = None,
) -> Evaluation:
    """The evaluation of a model at ``step``, with the ``data_shift`` that was found; and ``best`` is told of it.

    Each tensor is float64 ``(2, N)`` on the CPU, loss in nats and rightness (0 or 1) of each image: ``stored`` and
    ``precise`` of the same validation images in the same order, with stored and with population statistics;
    ``train`` of training images with population statistics. Intervals are drawn by a generator seeded with the step.
    """
    loss_damage, accuracy_damage = stored[0] - precise[0], precise[1] - stored[1]
    return Evaluation(
        step=step,
        epoch=epoch,
        num_images=stored.shape[1],
        stored=_scores(stored),
        population=_scores(precise),
        loss_damage=loss_damage.mean().item(),
        loss_damage_se=_standard_error(loss_damage),
        accuracy_damage=accuracy_damage.mean().item(),
        accuracy_damage_se=_standard_error(accuracy_damage),
        loss_damage_interval=_interval(loss_damage, step),
        accuracy_damage_interval=_interval(accuracy_damage, step),
        train=_scores(train),
        since_best=best.since(precise[0], step),
        data_shift=data_shift,
    )


def _scores(images: Tensor) -> Scores:
    loss, accuracy = images.mean(dim=1).tolist()
    return Scores(loss=loss, accuracy=accuracy)


def _standard_error(values: Tensor) -> float:
    """Of their mean: the unbiased standard deviation over the root of the count; NaN for a single value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _interval(values: Tensor, step: int) -> Interval:
    low, high = mean_interval(values, generator=torch.Generator().manual_seed(step))
    return Interval(low=low, high=high)
