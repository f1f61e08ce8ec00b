"""GhostBatchNorm: BatchNorm over virtual batches inside one rank's batch."""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class GhostBatchNorm(_BatchNorm):
    """BatchNorm of each ``virtual_batch_size`` samples by themselves, in the order they stand in the batch.

    Large batches then keep the noise of small ones. The last virtual batch holds what is left over, and is
    normalized by the statistics of exactly those samples.

    The running statistics take one step of ``momentum`` for each virtual batch, in order, whatever its size: what
    BatchNorm would hold had it been given the virtual batches one after another. (Algorithm 1 of the source folds
    these steps into one weighted sum.) ``num_batches_tracked`` counts virtual batches.

    In evaluation it is BatchNorm. Nothing is exchanged with other ranks.

    Shape: ``(N, C, *) -> (N, C, *)``, 2-d to 5-d.
    Cost: as BatchNorm, but in ``ceil(N / virtual_batch_size)`` calls and a copy of the output.
    Raises: ValueError if the input has not ``num_features`` channels, or, in training, if a virtual batch holds
        fewer than two values per channel.
    Source: Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", Algorithm 1.

    Args:
        num_features: ``C``.
        virtual_batch_size: samples in a virtual batch, at least 1; not less than ``N`` makes it BatchNorm.
        eps: added to the variance before its root is taken.
        momentum: share of a virtual batch in the new running statistics; None for the mean over all.
        affine: whether to learn ``weight`` and ``bias``.
        track_running_stats: whether to keep running statistics; without, evaluation uses the whole batch's own.
        device: where parameters and buffers are made.
        dtype: type of parameters and buffers.
    """

    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be at least 1, got {virtual_batch_size}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.virtual_batch_size = virtual_batch_size

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check_input_dim(input)
        if not self.training or len(input) <= self.virtual_batch_size:
            return super().forward(input)
        self._check_last(input)
        normalize = super().forward
        return torch.cat([normalize(ghost) for ghost in torch.split(input, self.virtual_batch_size)])

    def extra_repr(self) -> str:
        """BatchNorm's, and the size of a virtual batch."""
        batchnorm: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{batchnorm}, virtual_batch_size={self.virtual_batch_size}"

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected an input of 2 to 5 dimensions (N, C, *), got {input.dim()}")
        if input.size(1) != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got an input of shape {tuple(input.shape)}"
            )

    def _check_last(self, input: Tensor) -> None:
        """Before any statistic moves: a single value has no variance."""
        num_samples = len(input) % self.virtual_batch_size or self.virtual_batch_size
        if num_samples == 1 and input[0, 0].numel() == 1:
            raise ValueError(
                f"a batch of {len(input)} in virtual batches of {self.virtual_batch_size} leaves one with a single "
                "value per channel, which has no variance; drop incomplete batches or choose another size"
            )
