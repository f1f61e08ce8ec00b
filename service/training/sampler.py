"""Which training images each rank sees at each step: a pure function of seed, step and rank."""

import numpy as np
import torch
from torch import Tensor


class BatchSampler:
    """Cuts a fresh permutation of the images per epoch into global batches, and each of those into ranks.

    A global batch is ``world_size * batch_size_per_rank`` images in a row of the permutation; rank ``r`` takes the
    ``r``-th slice. The images left over at an epoch's end, fewer than a global batch, are dropped: every step
    then has the same number of images on every rank. The position is the global step and nothing else, so
    a run can go on from any step. The permutation depends on seed and epoch alone, not on the number of ranks.

    Raises: ValueError if there are fewer images than one global batch.
    """

    def __init__(self, num_images: int, batch_size_per_rank: int, rank: int, world_size: int, seed: int) -> None:
        self.global_batch_size = batch_size_per_rank * world_size
        if num_images < self.global_batch_size:
            raise ValueError(
                f"the training set has {num_images} images, fewer than one global batch of {self.global_batch_size} "
                f"({world_size} workers x {batch_size_per_rank}); lower batch_size_per_worker or num_workers"
            )
        self.steps_per_epoch = num_images // self.global_batch_size
        self._num_images = num_images
        self._batch_size_per_rank = batch_size_per_rank
        self._rank = rank
        self._seed = seed
        self._epoch = 0
        self._order = torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        """The epoch, from 1, of step ``step``, from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def indices(self, step: int) -> Tensor:
        """The rank's images at step ``step`` (from 1): int64 ``(batch_size_per_rank,)``. One permutation per epoch."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            self._order = permutation(self._num_images, self._seed, epoch)
            self._epoch = epoch
        start = (step - 1) % self.steps_per_epoch * self.global_batch_size + self._rank * self._batch_size_per_rank
        return self._order[start : start + self._batch_size_per_rank]


def permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: int64 ``(num_images,)``, from numpy's PCG64 seeded with both numbers."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(num_images))
