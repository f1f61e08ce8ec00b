"""SyncBatchNorm: the layer, with torch's argument order and state-dict keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.exchange import peers
from syncbn.functional import batch_norm_over, zero_where_masked
from syncbn.kernels.aten import statistics_dtype
from syncbn.moments import BatchMoments
from syncbn.recomputation import is_recomputing


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over every rank of ``process_group``.

    In training each rank's batch is normalized by the mean and variance of all ranks' batches together, so that W
    ranks compute what one process would with the joined batch. In evaluation it is torch's BatchNorm, plus masks and
    mixed types. Where a process has no peers it is that in training too, plus empty batches and checkpointing, as far
    as torch sums without loss: in float64, and in float32 on a CPU with channels first, 3-d and more.

    Shape: ``(N, C, *) -> (N, C, *)``, 2-d to 5-d; ``N`` and ``*`` may differ by rank and ``N`` may be 0.
    Units: ``running_mean`` as the input; ``running_var`` squared, unbiased over the global batch
        (the batch itself is normalized by the biased variance). All ranks hold the same bits, so
        DistributedDataParallel need not broadcast buffers.
    Cost: in training one exchange of ``2C + 1`` doubles forward and one of ``2C`` backward; all ranks must call.
        In evaluation none, also where running statistics are not tracked.
    Gradients: those of ``weight`` and ``bias`` are the rank's own sums, which DistributedDataParallel averages. All
        may be differentiated again.
    Masking: ``layer(input, mask)`` counts only positions where the boolean ``mask``, ``(N, *)`` or ``(N,)``, is True,
        in training and evaluation; its output is zero elsewhere. For lengths of padded sequences it is
        ``torch.arange(input.size(2)) < lengths[:, None]``.
    Checkpointing: a recomputation inside a backward pass counts for nothing and communicates nothing, save around a
        segment that is checkpointed itself without reentrance, and in compiled code.
    Raises: ValueError if the input has not ``num_features`` channels, or if the ranks together hold
        only one value per channel; judged after the exchange, so that every rank raises. Where no rank
        holds any value, nothing is raised and the statistics stay. See `sync_batch_norm` for compiled code.
        RanksDisagree on every rank, if they do not come with the same layer, direction, number of channels and type
        of input (over gloo; see `check_agreement` for NCCL). RanksMissing if a rank does not come within the
        process group's timeout.
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
        bias: whether there is a ``bias`` beside the ``weight``.
    """

    layer_name = ""
    """Path in the model (`name_layers`), which errors name and all ranks must share."""

    instead_of_tracking: Callable[[BatchMoments], None] | None = None
    """What takes the moments of each batch in place of the running statistics; see `accumulate_statistics`."""

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
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group
        self._num_input_dims: int | None = None  # of the last input, for the way back to torch's class

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroup | None = None) -> nn.Module:
        """`syncbn.convert_sync_batchnorm` where torch's class has it; unlike there, ``module`` itself is changed."""
        from syncbn.convert import convert_sync_batchnorm  # which imports this class

        return convert_sync_batchnorm(module, process_group)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``, where ``mask`` is True if there is one; see the class."""
        self._check_input_dim(input)
        if not torch.compiler.is_compiling():  # an exported program may have no side effects
            self._num_input_dims = input.dim()
        group = peers(self.process_group) if self.training else None
        uses_batch = self.training or self.running_mean is None
        if group is not None or (uses_batch and (mask is not None or not self._can_leave_batch_to_torch(input))):
            return self._normalize_by_batch(group, input, mask)
        if self.training and is_recomputing():
            return self._forward_uncounted(input)
        if mask is None:
            return self._forward_as_torch(input)
        return zero_where_masked(self._forward_as_torch(zero_where_masked(input, mask)), mask)

    def _forward_as_torch(self, input: Tensor) -> Tensor:
        if self._has_torchs_types(input):
            # Not super's, which in a subclass may be that of torch's SyncBatchNorm.
            return _BatchNorm.forward(self, input)
        dtype = statistics_dtype(input)
        mean, var, weight, bias = (
            None if tensor is None else tensor.to(dtype)
            for tensor in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)

    def _forward_uncounted(self, input: Tensor) -> Tensor:
        """What torch's layer computes in training, leaving the buffers, which a first run has moved already.

        Copies are passed in their stead: a recomputation must save as many tensors as the first run.
        """
        tracked = [self.running_mean, self.running_var] if self.track_running_stats else [None, None]
        mean, var = (None if buffer is None else buffer.clone() for buffer in tracked)
        return F.batch_norm(input, mean, var, self.weight, self.bias, True, 0.0, self.eps)

    def _can_leave_batch_to_torch(self, input: Tensor) -> bool:
        """Whether torch's layer would take ``input``'s statistics, in training exactly, and track them as we do.

        Its sums in float32 are exact only along the rows of a CPU tensor: with channels last, a mean of 1e4 standard
        deviations can leave a variance that is 90 times too large.
        """
        if not self._has_torchs_types(input):
            return False
        if not self.training:
            return True
        if input.numel() == 0 or self.instead_of_tracking is not None:
            return False
        if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active() or input.is_meta:
            return self.momentum is not None  # else torch reads its count of batches
        if torch.compiler.is_compiling() or input.device.type != "cpu":
            return False
        if input.dtype == torch.float64:
            return True
        return input.dtype == torch.float32 and input.is_contiguous() and not input.movedim(1, -1).is_contiguous()

    def _has_torchs_types(self, input: Tensor) -> bool:
        """Whether parameters and buffers are of ``input``'s type, or of float32 beside a half-precision input."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        types = {tensor.dtype for tensor in tensors if tensor is not None}
        is_half = input.dtype in (torch.float16, torch.bfloat16)
        return types <= {input.dtype} or (is_half and types == {torch.float32})

    def _normalize_by_batch(self, group: ProcessGroup | None, input: Tensor, mask: Tensor | None) -> Tensor:
        tracked = self.training and self.track_running_stats
        return batch_norm_over(
            group,
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            mask,
            self.num_batches_tracked,
            # Without tracking nothing is averaged, and momentum=None asks for a count of batches.
            self.momentum if tracked else 0.0,
            self.eps,
            self.layer_name,
            self.instead_of_tracking if tracked else None,
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

    def __copy__(self) -> SyncBatchNorm:
        """A copy that shares parameters, buffers and group: what pickling would refuse stays in this process."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """For pickling. A given default group becomes None, which is the default group wherever it is loaded.

        Raises:
            TypeError: if the layer has any other group, which nothing can hold but the processes that it joins.
        """
        if self.process_group not in (None, _default_group()):
            name = f" '{self.layer_name}'" if self.layer_name else ""
            raise TypeError(
                f"cannot pickle the SyncBatchNorm{name}: its process group is a connection, which exists only within "
                "the processes that it joins; save model.state_dict() instead, or set the layer's process_group to "
                "None and, where it is loaded, give it a group by convert_sync_batchnorm(model, process_group)"
            )
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        constructor, args, state, *rest = reduced
        return constructor, args, {**state, "process_group": None}, *rest


def _default_group() -> ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
