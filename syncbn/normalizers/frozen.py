"""FrozenBatchNorm: BatchNorm as the fixed affine map that it is in evaluation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm(nn.Module):
    """``(x - running_mean) / sqrt(running_var + eps) * weight + bias`` per channel, in every mode, for good.

    For fine-tuning with batches too small for statistics of their own. Nothing here is ever updated: ``weight`` and
    ``bias`` are buffers, so that no optimizer, no ``requires_grad_`` and no DistributedDataParallel takes them for
    parameters, and ``train()`` changes nothing. The gradient of the input is that of the affine map.

    For a while only, with the BatchNorm kept in its place, see `syncbn.freeze`.

    Shape: ``(N, C, *) -> (N, C, *)``, 2-d and more; a sample's output depends on that sample alone.
    State: a BatchNorm's, key by key, with ``affine`` as it was; checkpoints of either load into the other.
    Source: the inference form of Ioffe and Szegedy 2015, Algorithm 2, line 11.

    Args:
        num_features: ``C``.
        eps: added to the variance before its root is taken.
        affine: whether there are ``weight`` and ``bias``.
        device: where the buffers are made.
        dtype: their type.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features, device=device, dtype=dtype) if affine else None)
        self.register_buffer("bias", torch.zeros(num_features, device=device, dtype=dtype) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def forward(self, input: Tensor) -> Tensor:
        """The affine map; see the class."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        """Number of channels and eps."""
        return f"{self.num_features}, eps={self.eps}"
