"""SyncBatchNorm: the layer, with torch's argument order and state-dict keys."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.exchange import peers
from syncbn.functional import sync_batch_norm


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over every rank of ``process_group``.

    In training each rank's batch is normalized by the mean and variance of all ranks' batches together, so that W
    ranks compute what one process would with the joined batch. In evaluation, and where a process has no peers,
    it is torch's BatchNorm.

    Shape: ``(N, C, *) -> (N, C, *)``, 2-d to 5-d; ``N`` and ``*`` may differ by rank and ``N`` may be 0.
    Units: ``running_mean`` as the input; ``running_var`` squared, unbiased over the global batch
        (the batch itself is normalized by the biased variance). All ranks hold the same bits, so
        DistributedDataParallel need not broadcast buffers.
    Cost: in training one exchange of ``2C + 1`` doubles forward and one of ``2C`` backward; all ranks must call.
        In evaluation none, also where running statistics are not tracked.
    Gradients: those of ``weight`` and ``bias`` are the rank's own sums, which DistributedDataParallel averages.
    Raises: ValueError if the input has not ``num_features`` channels, or if the ranks together hold
        fewer than two values per channel; judged after the exchange, so that every rank raises. Where no rank
        holds any value, nothing is raised and the statistics stay.
    Source: Ioffe and Szegedy 2015, Algorithms 1 and 2.

    Args:
        num_features: ``C``.
        eps: added to the variance before its root is taken.
        momentum: share of the batch in the new running statistics; None for the mean over all batches.
        affine: whether to learn ``weight`` and ``bias``.
        track_running_stats: whether to keep running statistics; without, evaluation uses the rank's own batch.
        process_group: whom to exchange with; None for the default group, if there is one when the layer is called.
        device: where parameters and buffers are made.
        dtype: type of parameters and buffers; half-precision inputs want them in float32.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group
        self._num_input_dims: int | None = None  # of the last input, for the way back to torch's class

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """`syncbn.convert_sync_batchnorm` where torch's class has it; unlike there, ``module`` itself is changed."""
        from syncbn.convert import convert_sync_batchnorm  # which imports this class

        return convert_sync_batchnorm(module, process_group)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check_input_dim(input)
        self._num_input_dims = input.dim()
        if not self.training or peers(self.process_group) is None:
            return super().forward(input)
        tracked = self.track_running_stats
        return sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            num_batches_tracked=self.num_batches_tracked,
            # Without tracking nothing is averaged, and momentum=None asks for a count of batches.
            momentum=self.momentum if tracked else 0.0,
            eps=self.eps,
            process_group=self.process_group,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected an input of 2 to 5 dimensions (N, C, *), got {input.dim()}")
        if input.size(1) != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got an input of shape {tuple(input.shape)}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy that talks to the same ranks: a process group is a connection and has no copies."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
