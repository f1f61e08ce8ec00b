"""InstanceNorm: torch's, for any number of spatial dimensions, and never mistaking a batch for a sample."""

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm


class InstanceNorm(_InstanceNorm):
    """Normalization of each channel of each sample over its positions; torch's arguments and state.

    torch's InstanceNorm1d to 3d also take a sample without a batch, and so read the ``(N, C)`` that a BatchNorm1d
    is given as one sample of ``N`` channels. This one, which stands in for BatchNorm, takes batches only.

    Shape: ``(N, C, *) -> (N, C, *)``, 3-d to 5-d; ``*`` may vary. A sample's output depends on that sample alone.
    Units: with ``track_running_stats``, those of the mean over samples of each sample's mean and of its unbiased
        variance. Evaluation then uses these; without (the default) it does as in training.
    Raises: ValueError if the input has no positions or not ``num_features`` channels.
    Source: Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization".
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check_input_dim(input)
        if len(input) == 0:  # which torch's operator does not take
            return F.group_norm(input, self.num_features, self.weight, self.bias, self.eps)
        normalized: Tensor = self._apply_instance_norm(input)  # type: ignore[no-untyped-call]
        return normalized

    def _check_input_dim(self, input: Tensor) -> None:
        if not 3 <= input.dim() <= 5:
            raise ValueError(
                f"expected an input of 3 to 5 dimensions (N, C, *), got {tuple(input.shape)}: a channel without "
                "positions is a single value, which instance norm cannot normalize; LayerNorm or GroupNorm can"
            )
        if input.size(1) != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1, got an input of shape {tuple(input.shape)}"
            )
