"""Estimators of population statistics: what is made of the moments of many batches, on each rank and over all.

With batches ``b`` of ``m_b`` values, means ``mu_b`` and biased variances ``v_b``, all per channel.
"""

from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from syncbn.moments import BatchMoments


class Estimator(StrEnum):
    """How the population's mean and variance are estimated from batches. Every rank's batches count alike.

    ``POOLED``: mean and variance of all values together, as of one large batch; no batch size biases it, and none
        weighs more than its values. Wu and Johnson 2021 ("Rethinking 'Batch' in BatchNorm"), section 3.
    ``MEAN_OF_BATCHES``: the mean of ``mu_b``, and the mean of ``m_b / (m_b - 1) * v_b``, all batches alike. Misses
        how far the means of batches differ by more than chance. Ioffe and Szegedy 2015, Algorithm 2, line 10.
    ``MOVING_AVERAGE``: what training tracks (the same paper, section 3.1), replayed with each layer's own momentum
        ``a``: the mean as above, with the weight ``a * (1 - a)^k`` for a batch with ``k`` batches after it on its
        rank. The weights are divided by their sum, so that no starting value is left (Kingma and Ba 2015, section
        3). With ``momentum=None`` the weights are equal.
    """

    POOLED = "pooled"
    MEAN_OF_BATCHES = "mean_of_batches"
    MOVING_AVERAGE = "moving_average"


class Estimate(Protocol):
    """An estimate under way for one layer; ``O(C)`` memory however many batches."""

    def add(self, batch: BatchMoments) -> None:
        """Take one more batch in; one without values changes nothing."""

    def result(self) -> BatchMoments:
        """The estimate from the batches so far; ``unbiased_var`` is that of the variance, ``count`` that of values."""

    def pack(self) -> Tensor:
        """A vector of float64; those of several ranks add up."""

    def unpack(self, vector: Tensor) -> BatchMoments:
        """The result from a sum of packed vectors."""


def estimate_for(
    estimator: Estimator, num_channels: int, momentum: float | None, device: torch.device | None = None
) -> Estimate:
    """An estimate that has seen nothing, for a layer of ``num_channels`` with ``momentum``.

    Raises:
        ValueError: for a moving average with a momentum of 0, in which no batch has a weight; for an ``estimator`` by
            another name than one of `Estimator`.
    """
    match Estimator(estimator):
        case Estimator.POOLED:
            return _Pooled(num_channels, device)
        case Estimator.MEAN_OF_BATCHES:
            return _WeightedBatches(num_channels, None, device)
        case Estimator.MOVING_AVERAGE:
            if momentum == 0:
                raise ValueError(f"a layer with momentum=0 has no moving average; choose {Estimator.POOLED!r}")
            return _WeightedBatches(num_channels, momentum, device)


class _Pooled:
    def __init__(self, num_channels: int, device: torch.device | None) -> None:
        self._moments = BatchMoments.empty(num_channels, device)

    def add(self, batch: BatchMoments) -> None:
        self._moments = self._moments.merge(batch)

    def result(self) -> BatchMoments:
        return self._moments

    def pack(self) -> Tensor:
        return self._moments.pack()

    def unpack(self, vector: Tensor) -> BatchMoments:
        return BatchMoments.unpack(vector)


class _WeightedBatches:
    """Weighted sums of the batches' means and unbiased variances, of their weights, and of their counts."""

    def __init__(self, num_channels: int, momentum: float | None, device: torch.device | None) -> None:
        self._sums = torch.zeros(2 * num_channels + 1, dtype=torch.float64, device=device)
        self._count = torch.zeros(1, dtype=torch.float64, device=device)
        self._momentum = momentum

    def add(self, batch: BatchMoments) -> None:
        self._count = self._count + batch.count
        batch_sums = torch.cat([batch.mean, batch.unbiased_var, torch.ones_like(self._count)])
        present = batch.count.clamp(max=1)  # 0 for a batch without values, and the device is not asked
        if self._momentum is None:
            self._sums = self._sums + batch_sums * present
        else:
            self._sums = torch.lerp(self._sums, batch_sums, present * self._momentum)

    def result(self) -> BatchMoments:
        return self.unpack(self.pack())

    def pack(self) -> Tensor:
        """``[sum w mu, sum w u, sum w, sum m]``, ``(2C + 2,)``; ``u`` being ``m / (m - 1) * v``."""
        return torch.cat([self._sums, self._count])

    def unpack(self, vector: Tensor) -> BatchMoments:
        weight, count = vector[-2], vector[-1]
        mean, unbiased_var = (vector[:-2] / torch.where(weight > 0, weight, 1.0)).chunk(2)
        # The biased variance of as many values, from which `unbiased_var` computes this one again.
        return BatchMoments(count, mean, unbiased_var * ((count - 1).clamp(min=1) / count.clamp(min=1)))
