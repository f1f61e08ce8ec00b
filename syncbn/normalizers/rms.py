"""ChannelRMSNorm: RMSNorm over dimension 1, where BatchNorm has its channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, the mean over the channels of one sample at one position.

    Equation 4 of the source takes the root mean square over the summed inputs of one layer at once. For ``(N, C)``
    these are the ``C`` channels. Where a layer is applied at many positions with the same weights, as to the tokens of
    a sequence or the pixels of an image, each position has its own; so the axes here are ``C`` only, unlike those of
    LayerNorm over ``(C, *)``. No mean is subtracted and there is no bias.

    `torch.nn.RMSNorm` normalizes trailing dimensions; this is the same with the channels in dimension 1.

    Shape: ``(N, C, *) -> (N, C, *)``, 2-d and more; ``*`` may vary. A sample's output depends on that sample alone.
    Raises: ValueError if the input has not ``num_features`` channels.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    Args:
        num_features: ``C``.
        eps: added to the mean square before its root is taken.
        affine: whether to learn ``weight``.
        device: where ``weight`` is made.
        dtype: its type.
    """

    weight: nn.Parameter | None

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
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got an input of shape {tuple(input.shape)}"
            )
        return F.rms_norm(input.movedim(1, -1), (self.num_features,), self.weight, self.eps).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Number of channels, eps and whether there is a weight."""
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"
