"""What the stored running statistics cost: the same weights judged with them and with the population's.

The two judgements are paired image by image, so that their difference carries an error far below that of either.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from service.jobs import Drift, Evaluation
from service.training.comparison import BestEvaluation, compare
from service.training.context import RankContext
from service.training.data_shift import measure_data_shift, seen_by_first_layer
from service.training.dataset import Dataset
from service.training.layer_drift import layer_drifts
from service.training.population import Population, measure_population
from service.training.sampler import permutation
from syncbn import rank_disagreement, using_statistics

NUM_POPULATION_IMAGES = 1000
"""Enough for population statistics, as Wu and Johnson 2021 found: a thousand to ten thousand."""
_POPULATION_BATCH_SIZE = 250
_VALIDATION_BATCH_SIZE = 1000


@dataclass(frozen=True)
class ImageShare:
    """One rank's share of ``num_images`` images, in batches of images and labels; no rank has over ``most_images``."""

    batches: tuple[tuple[Tensor, Tensor], ...]
    num_images: int
    most_images: int


@dataclass(frozen=True)
class Examiner:
    """Looks at a model from time to time; all ranks look together.

    Each rank holds its share of the validation images and of the training images that stand for the population:
    the same ones every time, in the same batches however many ranks there are. ``autocast`` makes the context that
    every forward pass runs in. ``num_images_per_statistic`` share one batch statistic in training. ``best`` is what
    rank 0 remembers of its evaluations.
    """

    context: RankContext
    autocast: Callable[[], AbstractContextManager[object]]
    validation_images: ImageShare
    population_images: ImageShare
    num_images_per_statistic: int
    best: BestEvaluation = field(default_factory=BestEvaluation)

    def population(self, model: nn.Module) -> Population:
        """What stands for the population, for the weights as they are. Two exchanges; live buffers stay as they are."""
        with self.autocast():
            return measure_population(model, self.population_images.batches)

    def evaluate(self, model: nn.Module, population: Population, step: int, epoch: int) -> Evaluation | None:
        """Scores with rank 0's stored statistics, which a checkpoint ships, and with ``population``'s.

        Two passes over this rank's validation images and one over its population images, in evaluation mode, and
        three exchanges; the model is left as it was. Rank 0 is brought the scores of every single image, and makes the
        evaluation of them; the others get None.
        """
        with evaluation_mode(model):
            with _buffers_of_rank_zero(model, self.context):
                stored = self._judge(model, self.validation_images)
            with using_statistics(model, population.moments):
                with seen_by_first_layer(model, population) as seen:
                    precise = self._judge(model, self.validation_images)
                train = self._judge(model, self.population_images)
        scores = self._brought_to_rank_zero(torch.cat([stored, precise]), self.validation_images)
        trains = self._brought_to_rank_zero(train, self.population_images)
        shift = measure_data_shift(model, population, seen)
        if scores is None or trains is None:
            return None
        return compare(scores[:2], scores[2:], trains, self.best, step, epoch, shift)

    def drift(self, model: nn.Module, population: Population, step: int, *, has_no_start: bool = False) -> Drift:
        """Stored statistics against ``population``, and the ranks' against each other. One exchange."""
        disagreement = rank_disagreement(model)
        layers = layer_drifts(model, population, disagreement, self.num_images_per_statistic, has_no_start=has_no_start)
        return Drift(step=step, num_population_images=self.population_images.num_images, layers=layers)

    def _judge(self, model: nn.Module, share: ImageShare) -> Tensor:
        """Loss and rightness of each of this rank's images: float64 ``(2, N)``."""
        scores = [torch.empty(2, 0, dtype=torch.float64, device=self.context.device)]
        for images, labels in share.batches:
            with torch.no_grad(), self.autocast():
                logits = model(images).double()
            right = logits.argmax(dim=1) == labels
            scores.append(torch.stack([F.cross_entropy(logits, labels, reduction="none"), right.double()]))
        return torch.cat(scores, dim=1)

    def _brought_to_rank_zero(self, columns: Tensor, share: ImageShare) -> Tensor | None:
        """All ranks' ``columns``, one for each image of their ``share``, side by side in the order of ranks: on rank 0.

        One gather, float64 ``(K, num_images)`` on the CPU. A rank without images joins with padding alone; if it did
        not, the others would wait for it.
        """
        if self.context.world_size == 1:
            return columns.cpu()
        padded = columns.new_zeros(len(columns) + 1, share.most_images)
        padded[:-1, : columns.shape[1]] = columns
        padded[-1, : columns.shape[1]] = 1.0  # marks what is no padding
        gathered = [torch.empty_like(padded) for _ in range(self.context.world_size)] if self.context.leads else None
        dist.gather(padded, gathered, dst=0)
        if gathered is None:
            return None
        joined = torch.cat(gathered, dim=1).cpu()
        return joined[:-1, joined[-1] == 1.0]


def make_examiner(
    dataset: Dataset,
    context: RankContext,
    autocast: Callable[[], AbstractContextManager[object]],
    num_images_per_statistic: int,
) -> Examiner:
    """The examiner of one rank: validation images in equal slices, population batches dealt out in turn."""
    return Examiner(
        context=context,
        autocast=autocast,
        validation_images=_slice_of_validation(dataset, context),
        population_images=_share_of_population(dataset, context),
        num_images_per_statistic=num_images_per_statistic,
    )


def _slice_of_validation(dataset: Dataset, context: RankContext) -> ImageShare:
    num_images = len(dataset.validation_images)
    start = num_images * context.rank // context.world_size
    end = num_images * (context.rank + 1) // context.world_size
    images, labels = dataset.validation_images[start:end], dataset.validation_labels[start:end]
    # Split by hand: torch would make one empty batch of no images.
    parts = [slice(first, first + _VALIDATION_BATCH_SIZE) for first in range(0, len(images), _VALIDATION_BATCH_SIZE)]
    most = -(-num_images // context.world_size)
    return ImageShare(tuple((images[part], labels[part]) for part in parts), num_images, most)


def _share_of_population(dataset: Dataset, context: RankContext) -> ImageShare:
    # An epoch that no training has, so that the choice hangs on nothing: files may be sorted by class.
    chosen = permutation(len(dataset.train_images), seed=0, epoch=0)[:NUM_POPULATION_IMAGES]
    num_batches = max(1, round(len(chosen) / _POPULATION_BATCH_SIZE))
    batches = chosen.to(dataset.train_images.device).tensor_split(num_batches)
    own = batches[context.rank :: context.world_size]
    most = sum(len(batch) for batch in batches[:: context.world_size])  # earlier batches are not smaller
    return ImageShare(
        tuple((dataset.train_images[batch], dataset.train_labels[batch]) for batch in own), len(chosen), most
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
