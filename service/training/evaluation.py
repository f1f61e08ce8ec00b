"""What the stored running statistics cost: the same weights judged with them and with the population's.

The two judgements are paired image by image, so that their difference carries an error far below that of either.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from service.jobs import Drift, Evaluation, LayerDrift, Scores
from service.training.context import RankContext
from service.training.dataset import Dataset
from service.training.sampler import permutation
from syncbn import BatchMoments, measure_drift, population_statistics, rank_disagreement, using_statistics

NUM_POPULATION_IMAGES = 1000
"""Enough for population statistics, as Wu and Johnson 2021 found: a thousand to ten thousand."""
_POPULATION_BATCH_SIZE = 250
_VALIDATION_BATCH_SIZE = 1000


@dataclass(frozen=True)
class Examiner:
    """Looks at a model from time to time; all ranks look together.

    Each rank holds its share of the validation images and of the training images that stand for the population:
    the same ones every time, in the same batches however many ranks there are. ``autocast`` makes the context that
    every forward pass runs in.
    """

    context: RankContext
    autocast: Callable[[], AbstractContextManager[object]]
    validation_images: Tensor
    validation_labels: Tensor
    population_batches: tuple[Tensor, ...]
    num_population_images: int

    def population(self, model: nn.Module) -> dict[str, BatchMoments]:
        """Population statistics of every BatchNorm layer. One exchange; live buffers stay as they are."""
        with self.autocast():
            return population_statistics(model, self.population_batches)

    def evaluate(self, model: nn.Module, population: dict[str, BatchMoments], step: int, epoch: int) -> Evaluation:
        """Scores with rank 0's stored statistics, which a checkpoint ships, and with ``population``'s.

        Two passes over this rank's validation images, two exchanges; the model is left as it was.
        """
        with evaluation_mode(model):
            with _buffers_of_rank_zero(model, self.context):
                stored = self._judge(model)
            with using_statistics(model, population):
                precise = self._judge(model)
        return _compare(self._sum_over_ranks(_paired_sums(stored, precise)), step, epoch)

    def drift(self, model: nn.Module, population: dict[str, BatchMoments], step: int) -> Drift:
        """Stored statistics against ``population``, and the ranks' against each other. One exchange."""
        disagreement = rank_disagreement(model)
        layers = tuple(
            LayerDrift(**asdict(drift), rank_disagreement=disagreement[drift.layer])
            for drift in measure_drift(model, population)
        )
        return Drift(step=step, num_population_images=self.num_population_images, layers=layers)

    def _judge(self, model: nn.Module) -> Tensor:
        """Loss and rightness of each of this rank's images: float64 ``(2, N)``."""
        images, labels = self.validation_images, self.validation_labels
        scores = [torch.empty(2, 0, dtype=torch.float64, device=images.device)]
        for start in range(0, len(images), _VALIDATION_BATCH_SIZE):
            truth = labels[start : start + _VALIDATION_BATCH_SIZE]
            with torch.no_grad(), self.autocast():
                logits = model(images[start : start + _VALIDATION_BATCH_SIZE]).double()
            right = logits.argmax(dim=1) == truth
            scores.append(torch.stack([F.cross_entropy(logits, truth, reduction="none"), right.double()]))
        return torch.cat(scores, dim=1)

    def _sum_over_ranks(self, sums: Tensor) -> list[float]:
        # A rank without validation images joins with zeros; if it did not, the others would wait for it.
        if self.context.world_size > 1:
            dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals


def make_examiner(
    dataset: Dataset, context: RankContext, autocast: Callable[[], AbstractContextManager[object]]
) -> Examiner:
    """The examiner of one rank: validation images in equal slices, population batches dealt out in turn."""
    num_images, num_train = len(dataset.validation_images), len(dataset.train_images)
    start = num_images * context.rank // context.world_size
    end = num_images * (context.rank + 1) // context.world_size
    # An epoch that no training has, so that the choice hangs on nothing: files may be sorted by class.
    chosen = permutation(num_train, seed=0, epoch=0)[:NUM_POPULATION_IMAGES]
    num_batches = max(1, round(len(chosen) / _POPULATION_BATCH_SIZE))
    batches = chosen.tensor_split(num_batches)[context.rank :: context.world_size]
    return Examiner(
        context=context,
        autocast=autocast,
        validation_images=dataset.validation_images[start:end],
        validation_labels=dataset.validation_labels[start:end],
        population_batches=tuple(dataset.train_images[batch.to(dataset.train_images.device)] for batch in batches),
        num_population_images=len(chosen),
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` normalizes by its stored statistics and leaves them alone; after it as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _paired_sums(stored: Tensor, precise: Tensor) -> Tensor:
    """Per-image values of this rank summed: count, the four scores, both damages and their squares, ``(9,)``."""
    loss_damage = stored[0] - precise[0]
    accuracy_damage = precise[1] - stored[1]
    values = torch.stack(
        [
            torch.ones_like(loss_damage),
            *stored,
            *precise,
            loss_damage,
            loss_damage.square(),
            accuracy_damage,
            accuracy_damage.square(),
        ]
    )
    return values.sum(dim=1)


def _compare(sums: list[float], step: int, epoch: int) -> Evaluation:
    count = sums[0]
    stored_loss, stored_accuracy, loss, accuracy = (total / count for total in sums[1:5])
    return Evaluation(
        step=step,
        epoch=epoch,
        num_images=int(count),
        stored=Scores(loss=stored_loss, accuracy=stored_accuracy),
        population=Scores(loss=loss, accuracy=accuracy),
        loss_damage=sums[5] / count,
        loss_damage_se=_standard_error(count, sums[5], sums[6]),
        accuracy_damage=sums[7] / count,
        accuracy_damage_se=_standard_error(count, sums[7], sums[8]),
    )


def _standard_error(count: float, total: float, total_of_squares: float) -> float:
    """Of a mean: the unbiased standard deviation over the root of the count; NaN for a single value."""
    if count < 2:
        return math.nan
    variance = (total_of_squares - total * total / count) / (count - 1)
    return 0.0 if variance < 0 else math.sqrt(variance / count)  # below 0 by rounding; NaN stays NaN


@contextmanager
def _buffers_of_rank_zero(model: nn.Module, context: RankContext) -> Iterator[None]:
    """Inside, every rank has rank 0's running statistics, so that all judge the same model; after it its own again.

    One broadcast. Under local normalization the ranks differ between DDP's own broadcasts.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if context.world_size == 1 or not buffers:
        yield
        return
    own = torch.cat([buffer.double().flatten() for buffer in buffers])
    leading = own.clone()
    dist.broadcast(leading, src=0)
    _fill(buffers, leading)
    try:
        yield
    finally:
        _fill(buffers, own)


def _fill(buffers: list[Tensor], values: Tensor) -> None:
    for buffer, part in zip(buffers, values.split_with_sizes([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
